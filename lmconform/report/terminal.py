"""The terminal report: findings first, the worst on top; at the end one sentence of verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lmconform.results import EXECUTED, FINDINGS, Cause, Report, Result, Status, tally

SHOWN = 12  # findings told in full
LINES = 14  # of one message
COLOURS = {
    "passed": "green", "failed": "red", "error": "red", "xpassed": "red", "not_run": "red", "warned": "yellow",
    "xfailed": "cyan", "not_applicable": "dim", "blocked": "dim",
}  # fmt: skip


def make_console(*, colour: bool = True) -> Console:
    """A console on stdout; 100 columns wide where that is no terminal and COLUMNS says nothing."""
    console = Console(highlight=False, markup=False, emoji=False, **({} if colour else {"color_system": None}))  # type: ignore[arg-type]
    if not console.is_terminal and "COLUMNS" not in console._environ:
        console.width = 100
    return console


# -- while it runs -----------------------------------------------------------------------------------------------------


@contextmanager
def progress(console: Console, subject: str) -> Iterator[Callable[[str, int, int], None]]:
    """A line that says what runs now, on a terminal only: call it with (check, done, of how many)."""
    if not console.is_terminal:
        yield lambda check, done, total: None
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.fields[subject]}", markup=False), BarColumn(bar_width=20),
        MofNCompleteColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("building", total=None, subject=subject)

        def show(check: str, done: int, total: int) -> None:
            bar.update(task, description=check, completed=done, total=total)

        yield show


# -- afterwards --------------------------------------------------------------------------------------------------------


def show_report(
    console: Console, report: Report, *, spec: str = "", seconds: float | None = None, quiet: bool = False
) -> None:
    """The whole report; `quiet` leaves findings, warnings and the verdict. `spec` is how the subject was named."""
    _header(console, report, spec)
    red = [result for result in report.failed if result.status != Status.not_run]
    _section(console, "Findings", by_weight(red))
    _not_run(console, [result for result in report.results if result.status == Status.not_run])
    _section(console, "Warnings", by_weight(report.warned))
    if report.causes:
        _causes(console, report.causes)
    if not quiet:
        _families(console, report.results)
        _reasons(console, "Does not apply", report.results, Status.not_applicable)
        _blocked(console, report.results)
        _reasons(console, "Expected failures and known deviations", report.results, Status.xfailed)
        if report.notes:
            console.print(Text("Notes", "bold"))
            for note in report.notes:
                _line(console, note)
            console.print()
        _line(console, tally(report.counts), indent=0)
        found = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        took = "" if seconds is None else f", {seconds:.1f} s"
        _line(console, f"seed {report.seed}{took}, {found}", indent=0, style="dim")
    _line(console, verdict(report), indent=0, style="bold green" if report.ok else "bold red")
    console.print()


def show_summary(console: Console, lines: Sequence[tuple[bool, str]]) -> None:
    """One line a subject, where there were several."""
    console.print(Text(f"{len(lines)} subjects", "bold"))
    for ok, text in lines:
        _line(console, text, style="green" if ok else "red")


def verdict(report: Report) -> str:
    """What it comes to, in one sentence."""
    name = report.subject
    counts = report.counts
    ran = sum(counts[status] for status in EXECUTED)
    if report.died and not ran:
        return f"{name}: {report.died}."
    if not ran:
        why = tally(counts) if report.results else "no check is selected in this profile"
        return f"{name}: nothing ran, so nothing is known ({why})."
    if report.ok:
        extra = _join(
            _count(counts["warned"], "warned"),
            _count(counts["xfailed"], "failed as expected"),
            _count(counts["not_applicable"], "not applicable"),
        )
        held = ran - counts["warned"] - counts["xfailed"]
        return f"{name}: no finding, {_every(held, ran)} hold{'s' if held == 1 else ''}{extra}."
    parts = [
        _failed(counts["failed"] + counts["error"], ran),
        _count(counts["blocked"], "blocked"),
        _count(counts["xpassed"], "passed though expected to fail"),
        _count(counts["not_run"], "not run"),
        _count(counts["warned"] if report.strict else 0, "warned (strict)"),
    ]
    text = ", ".join(filter(None, parts)) or "the process was lost"
    worst = next((r for r in by_weight(report.results) if r.status in FINDINGS and r.margin is not None), None)
    if worst is not None and worst.margin is not None and math.isfinite(worst.margin):
        text += f"; the widest margin is that of {worst.id}, {times(worst.margin)} the bound"
    if report.died and not counts["error"]:
        text += f"; {report.died}"
    return f"{name} does not conform: {text}."


def by_weight(results: Iterable[Result]) -> list[Result]:
    """Errors and what needs no number first, then by margin, the widest first."""

    def weight(result: Result) -> tuple[bool, float]:
        margin = result.margin
        return result.status != Status.error, -math.inf if margin is None or math.isnan(margin) else -margin

    return sorted(results, key=weight)


def times(margin: float) -> str:
    """'2.5 times', '312 times', '1e+12 times'."""
    return f"{number(margin)} times"


def number(value: float | None) -> str:
    """A margin in few characters."""
    if value is None:
        return "-"
    if 100 <= value < 1e6:
        return f"{value:,.0f}"
    return f"{value:.2g}"


def _header(console: Console, report: Report, spec: str) -> None:
    text = Text(report.subject, "bold")
    if spec not in ("", report.subject):
        text.append(f"  {spec}", "dim")
    text.append(f"  {report.profile} profile, {report.device}, {report.dtype}", "dim")
    console.print(text)
    console.print()


def _section(console: Console, title: str, results: list[Result]) -> None:
    if not results:
        return
    console.print(Text(f"{title} ({len(results)})", "bold"))
    console.print()
    for result in results[:SHOWN]:
        _finding(console, result)
    rest = results[SHOWN:]
    if rest:
        _line(console, f"and {len(rest)} more: " + ", ".join(result.id for result in rest))
        console.print()


def _finding(console: Console, result: Result) -> None:
    head = Text("  ")
    head.append(result.status, f"bold {COLOURS[result.status]}")
    head.append(f" {result.id}", "bold")
    console.print(head)
    lines = result.message.splitlines()
    for line in lines[:LINES]:
        _line(console, line, indent=4)
    if len(lines) > LINES:
        _line(console, f"({len(lines) - LINES} more lines; --json FILE has them all)", indent=4)
    if result.repro:  # one logical line, however long, so that it can be copied
        console.print(Text(f"    reproduce: {result.repro}"), style="dim", soft_wrap=True)
    console.print()


def _not_run(console: Console, results: list[Result]) -> None:
    for message, group in _grouped(results, lambda result: result.message):
        console.print(Text(f"Not run ({len(group)})", "bold red"))
        _line(console, message)
        _line(console, ids(group))
        console.print()


def _causes(console: Console, causes: Sequence[Cause]) -> None:
    console.print(Text("Likely causes", "bold"))
    for cause in causes[:5]:
        place = f" ({cause.where})" if cause.where else ""
        _line(console, f"{cause.score:.0%} {cause.id}: {cause.summary}{place}")
        evidence = ", ".join(str(item.get("check", "")) for item in cause.evidence)
        for title, text in (("seen in", evidence), ("confirm", cause.confirm), ("mend", cause.mend)):
            if text:
                _line(console, f"{title}: {text}", indent=4)
    console.print()


def _families(console: Console, results: Sequence[Result]) -> None:
    families: dict[str, list[Result]] = {}
    for result in results:
        families.setdefault(result.family, []).append(result)
    if not families:
        return
    used = [status for status in Status if any(result.status == status for result in results)]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("family", overflow="fold")
    for status in used:
        table.add_column(_short(status), justify="right", overflow="fold")
    table.add_column("seconds", justify="right", overflow="fold")
    margins = tightest(results) is not None
    if margins:
        table.add_column("margin", justify="right", overflow="fold")
        table.add_column("of", style="dim", overflow="fold")
    for family, members in families.items():
        counts = [sum(result.status == status for result in members) for status in used]
        cells = [Text(str(count or ""), COLOURS[status]) for count, status in zip(counts, used, strict=True)]
        tight = tightest(members)
        seconds = sum(result.seconds for result in members)
        closest = [number(tight.margin), tight.id.partition(".")[2]] if tight else []
        table.add_row(family, *cells, f"{seconds:.2f}", *closest)
    console.print(table)
    if margins:
        text = "margin: the widest measured / allowed in the family, and of which check; above 1 is red"
        _line(console, text, indent=0, style="dim")
    console.print()


def tightest(results: Iterable[Result]) -> Result | None:
    """The result with the largest margin; NaN counts as the largest."""
    numbered = [result for result in results if result.margin is not None]
    return max(numbered, key=lambda r: math.inf if r.margin is None or math.isnan(r.margin) else r.margin, default=None)


def _short(status: Status) -> str:
    return {"not_applicable": "n/a", "not_run": "not run"}.get(status.value, status.value)


def _reasons(console: Console, title: str, results: Sequence[Result], status: Status) -> None:
    chosen = [result for result in results if result.status == status]
    if not chosen:
        return
    console.print(Text(f"{title} ({len(chosen)})", "bold"))
    for reason, group in _grouped(chosen, lambda result: result.message.partition("\n")[0]):
        _line(console, f"{ids(group)}: {reason}")
    console.print()


def _blocked(console: Console, results: Sequence[Result]) -> None:
    """By what, and why where that is no finding of this report: it was not selected."""
    told = {result.id for result in results}
    chosen = [result for result in results if result.status == Status.blocked]
    if not chosen:
        return
    console.print(Text(f"Blocked ({len(chosen)})", "bold"))
    for root, group in _grouped(chosen, lambda result: result.where):
        reason = f"blocked by {root}, see above" if root in told else group[0].message.partition("\n")[0]
        _line(console, f"{ids(group)}: {reason}")
    console.print()


def ids(results: Sequence[Result], limit: int = 8) -> str:
    """'cache.decode, cache.chunks and 3 more'."""
    names = [result.id for result in results]
    if len(names) <= limit:
        return ", ".join(names)
    return ", ".join(names[: limit - 1]) + f" and {len(names) - limit + 1} more"


def _grouped(results: Iterable[Result], key: Callable[[Result], str]) -> list[tuple[str, list[Result]]]:
    order: dict[str, int] = {}
    for result in results:
        order.setdefault(key(result), len(order))
    in_order = sorted(results, key=lambda result: order[key(result)])
    return [(reason, list(group)) for reason, group in groupby(in_order, key)]


def _line(console: Console, text: str, *, indent: int = 2, style: str = "") -> None:
    """Text that wraps to the width, kept under its indent."""
    for part in Text(text, style).wrap(console, max(20, console.width - indent)):
        part.rstrip()
        console.print(Text(" " * indent).append_text(part), soft_wrap=True)


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count else ""


def _join(*parts: str) -> str:
    kept = [part for part in parts if part]
    return f" ({', '.join(kept)})" if kept else ""


def _failed(failed: int, ran: int) -> str:
    if not failed:
        return ""
    return "the one check that ran failed" if ran == 1 else f"{failed} of {ran} checks that ran failed"


def _every(held: int, ran: int) -> str:
    if held == 1 == ran:
        return "the one check that ran"
    return f"all {held} checks that ran" if held == ran else f"{held} of {ran} checks that ran"
