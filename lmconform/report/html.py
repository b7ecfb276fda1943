"""Reports as one self-contained HTML page: of one subject, of several, or of the zoo. It refers to nothing outside."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lmconform import __version__
from lmconform.charts import Chart, Map
from lmconform.options import OptionError
from lmconform.registry import all_checks
from lmconform.report.drawing import Artist
from lmconform.report.terminal import by_weight, number, tightest, verdict
from lmconform.results import EXECUTED, FINDINGS, Report, Result, Status

if TYPE_CHECKING:
    import jinja2

MANY = 8  # subjects on a page beyond which the charts of green checks are left out
WORDS = {"nothing": "nothing ran", "xfailed": "failed as expected", "xpassed": "passed unexpectedly"}
SIGNS = {
    "passed": "✓", "failed": "✗", "error": "✗", "xpassed": "✗", "not_run": "✗", "warned": "!", "xfailed": "≈",
    "not_applicable": "–", "blocked": "–", "green": "✓", "red": "✗", "triaged": "≈", "unreached": "–", "stale": "✗",
    "nothing": "–",
}  # fmt: skip
VERDICTS = ("red", "nothing", "green")
LOOKED_AT = ("cache", "padding")  # families whose error by position is shown at once; others' is folded
NUMBER = r"(?:[-+.e\d]+|-?inf|nan)"
FIGURES = re.compile(rf": measured {NUMBER}(, allowed {NUMBER})?( \({NUMBER} times the bound\))?$")


def require_libraries() -> None:
    """To be asked before a run. Raises OptionError, naming the extra, where jinja2 or matplotlib is not installed."""
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise OptionError(f"the HTML report needs {' and '.join(missing)}: pip install 'lmconform[report]'")


def environment() -> jinja2.Environment:
    """The templates, everything escaped."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("lmconform.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    made.globals.update(signs=SIGNS, number=number, version=__version__, infinite=math.inf)
    made.filters["words"] = lambda text: WORDS.get(text, str(text).replace("_", " "))
    return made


def render(reports: Sequence[Report]) -> str:
    """One page for all of them. Raises OptionError where a library of the extra `report` is missing."""
    require_libraries()
    artist = Artist()
    holds = {id: check.holds for id, check in all_checks().items()}
    pages = [_page_of(report, f"s{place}", artist, holds, len(reports)) for place, report in enumerate(reports, 1)]
    if len(pages) == 1:
        title = f"{pages[0].report.subject}: {'conforms' if pages[0].report.ok else 'does not conform'}"
    else:
        title = f"{sum(report.ok for report in reports)} of {len(reports)} subjects conform"
    tally = {word: sum(page.status == word for page in pages) for word in VERDICTS}
    families = sorted({family for page in pages for family in page.red_families})
    return _page("check.html", title=title, pages=pages, tally=_positive(tally), families=families)


def _page(template: str, **given: Any) -> str:
    made = environment()
    assert made.loader is not None
    script = made.loader.get_source(made, "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return made.get_template(template).render(**given, script=_markup(script), digest=digest)


def _markup(text: str) -> Any:
    """Text that is markup of our own: never anything that came from a subject."""
    from markupsafe import Markup

    return Markup(text)


# -- one subject -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A chart of a check, as an SVG, or the sentence that stands in its place."""

    check: str
    chart: Chart
    svg: Any

    @property
    def tall(self) -> bool:
        """Whether it takes the height of two."""
        return isinstance(self.chart, Map)


@dataclass(frozen=True)
class Told:
    """A red result taken apart: what it says, the facts with their names, and further remarks."""

    result: Result
    says: str
    facts: list[tuple[str, str]]
    notes: list[str]
    holds: str
    charts: list[Drawn]


@dataclass(frozen=True)
class Family:
    """One line of the ledger."""

    name: str
    counts: dict[str, int]
    seconds: float
    tightest: Result | None


@dataclass(frozen=True)
class Page:
    """What the template shows of one Report."""

    key: str
    report: Report
    status: str
    verdict: str
    findings: list[Told]
    warnings: list[Told]
    families: list[Family]
    measurements: list[Drawn]
    more_measurements: list[Drawn]
    left_out: bool
    holds: dict[str, str]  # what each check holds, for those known here

    @property
    def red_families(self) -> list[str]:
        return sorted({told.result.family for told in (*self.findings, *self.warnings)})

    @property
    def reds(self) -> set[str]:
        """The checks that this page has a card of."""
        return {told.result.id for told in (*self.findings, *self.warnings)}

    @property
    def seconds(self) -> float:
        return sum(result.seconds for result in self.report.results)

    @property
    def used(self) -> list[str]:
        """The statuses there are, in their fixed order."""
        return [status for status, count in self.report.counts.items() if count]


def _page_of(report: Report, key: str, artist: Artist, holds: dict[str, str], of: int) -> Page:
    def drawn(results: Iterable[Result]) -> list[Drawn]:
        return [Drawn(result.id, chart, _picture(artist, chart)) for result in results for chart in result.charts]

    def told(results: Iterable[Result]) -> list[Told]:
        return [tell(result, holds.get(result.id, ""), drawn([result])) for result in by_weight(results)]

    quiet = [result for result in report.results if result.status not in (*FINDINGS, Status.warned)]
    shown = drawn(quiet) if of <= MANY else []
    first = [one for one in shown if one.chart.title != "Error by position" or one.check.startswith(LOOKED_AT)]
    ran = any(result.status in EXECUTED for result in report.results)
    return Page(
        key=key,
        report=report,
        status="green" if report.ok else "red" if ran or report.failed else "nothing",
        verdict=_without_name(verdict(report), report.subject),
        findings=told(report.failed),
        warnings=told(report.warned),
        families=_families(report.results),
        measurements=first,
        more_measurements=[one for one in shown if one not in first],
        left_out=of > MANY and any(result.charts for result in quiet),
        holds=holds,
    )


def _picture(artist: Artist, chart: Chart) -> Any:
    try:
        return _markup(artist.svg(chart))
    except Exception as error:  # its figures and names come from the subject; the rest of the page is worth having
        return f"This picture could not be drawn ({type(error).__name__}: {error}); the JSON holds its figures."


def _without_name(text: str, name: str) -> str:
    """The verdict under a heading that is the name already."""
    text = text.removeprefix(name).lstrip(": ")
    return text[:1].upper() + text[1:]


def _families(results: Sequence[Result]) -> list[Family]:
    members: dict[str, list[Result]] = {}
    for result in results:
        members.setdefault(result.family, []).append(result)
    return [
        Family(
            name,
            {status.value: sum(result.status == status for result in own) for status in Status},
            sum(result.seconds for result in own),
            tightest(own),
        )
        for name, own in members.items()
    ]


FACTS = {"where", "smallest case", "case", "likely cause", "printed last"}


def tell(result: Result, holds: str = "", charts: Sequence[Drawn] = ()) -> Told:
    """A red result's message as sentence, facts and remarks; what it measured is told by its own fields."""
    first, *rest = result.message.splitlines() or [""]
    facts: list[tuple[str, str]] = []
    notes: list[str] = []
    for line in rest:
        label, colon, text = line.partition(": ")
        if colon and label in FACTS:
            facts.append((label, text))
        else:
            notes.append(line)
    return Told(result, FIGURES.sub("", first), facts, notes, holds, list(charts))


# -- the zoo -----------------------------------------------------------------------------------------------------------


def render_zoo(data: Mapping[str, Any]) -> str:
    """The page of a zoo run, from the data that its --json holds. Raises OptionError as `render` does."""
    require_libraries()
    from lmconform.zoo.rows import STATUSES, Row, red_by_check
    from lmconform.zoo.table import totals_line

    rows = sorted(map(Row.from_dict, data["rows"]), key=lambda row: (STATUSES.index(row.status), row.type))
    told_of = {row.type: _told_of(row) for row in rows}
    families_of = {type: sorted({id.partition(".")[0] for id in told}) for type, told in told_of.items()}
    totals = data["totals"]
    return _page(
        "zoo.html",
        title=f"Zoo of transformers: {totals['red']} of {totals['types']} types are red",
        ok=not totals["red"] and not totals["stale"],
        verdict=totals_line(totals),
        tally=_positive({status: totals[status] for status in STATUSES}),
        run=data["run"],
        notes=data["notes"],
        rows=rows,
        by_check=red_by_check(rows),
        told_of=told_of,
        families_of=families_of,
        families=sorted({family for found in families_of.values() for family in found}),
        stale="a known deviation that no longer shows; remove its entry",
    )


def _positive(counts: dict[str, int]) -> dict[str, int]:
    return {word: count for word, count in counts.items() if count}


def _told_of(row: Any) -> dict[str, str]:
    """The checks that a row has something to say of, and how they ended."""
    kinds = (("failed", row.failed), ("xfailed", row.xfailed), ("warned", row.warned), ("stale", row.stale))
    return {id: kind for kind, ids in kinds for id in ids}
