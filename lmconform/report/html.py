"""The report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING

from lmconform.options import OptionError
from lmconform.report.terminal import by_weight, number, verdict
from lmconform.results import Report, Status, tally

if TYPE_CHECKING:
    import jinja2


def template() -> jinja2.Template:
    """The page's template. Raises OptionError where jinja2 is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise OptionError("the HTML report needs jinja2: pip install 'lmconform[report]'") from error
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("lmconform.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(source)


def render(reports: Sequence[Report]) -> str:
    """One page for all of them; it refers to nothing outside itself."""
    return template().render(
        reports=reports,
        ok=all(report.ok for report in reports),
        verdict=verdict,
        findings=lambda report: by_weight([r for r in report.results if r in report.failed]),
        warnings=lambda report: by_weight(report.warned),
        number=number,
        tally=tally,
        Status=Status,
    )
