"""What `lmconform zoo` prints: progress, a line as each type ends, the table, the totals."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from lmconform.zoo.rows import STATUSES, Row, red_by_check

STYLES = {"red": "bold red", "unreached": "magenta", "triaged": "yellow", "green": "green"}


class Progressing:
    """A bar on a terminal; elsewhere only the line of each type."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console = console
        self.total = total
        self.done = done
        self.running: list[str] = []
        self.width = len(str(total))
        self._bar = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[running]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("", total=total, completed=done, running="importing transformers")

    def __enter__(self) -> Progressing:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, type: str) -> None:
        self.running.append(type)
        self._show()

    def end(self, row: Row) -> None:
        self.done += 1
        if row.type in self.running:
            self.running.remove(row.type)
        number = f"{self.done:>{self.width}}/{self.total}"
        self.console.print(f"{number} {_word(row)} {row.type:<24} {row.seconds:5.1f} s  {escape(_detail(row))}")
        self._show()

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.done, running=", ".join(self.running))


def _word(row: Row) -> str:
    return f"[{STYLES[row.status]}]{row.status:<9}[/]"


def _detail(row: Row) -> str:
    if row.status == "red" and row.failed and not row.cut_short:
        return ", ".join(row.failed)
    if row.status == "triaged":
        return ", ".join(row.xfailed)
    stale = f"stale: {', '.join(row.stale)}" if row.stale else ""
    return row.reason or stale or (f"warned: {', '.join(row.warned)}" if row.warned else "")


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Every type that is not plainly green with its reason, red first; the green ones by name."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("type", "status", "check", "what it says"):
        table.add_column(name, overflow="fold", no_wrap=name != "what it says")
    for status in STATUSES:
        for row in sorted((row for row in rows if row.status == status), key=lambda row: row.type):
            _add(table, row)
    console.print()
    if table.row_count:
        console.print(table)
    if green := [row.type for row in rows if row.status == "green"]:
        console.print(f"[green]green[/] ({len(green)}): {', '.join(sorted(green))}")
    if red := red_by_check(rows):
        console.print("\nred by check:")
        for id, found in red.items():
            console.print(f"  {id} ({len(found)}): {', '.join(row.type for row in found)}")
    for row in rows:
        if row.output:
            console.print(f"\nlast lines of {row.type}:\n{escape(row.output)}", highlight=False)


def _add(table: Table, row: Row) -> None:
    lines = [(id, row.messages.get(id, "")) for id in [*row.failed, *row.xfailed]]
    lines += [(id, "stale: a known deviation that no longer shows; remove its entry") for id in row.stale]
    if not lines and row.status != "green":
        lines = [("", row.reason)]
    for number, (id, text) in enumerate(lines):
        first = number == 0
        table.add_row(row.type if first else "", _word(row) if first else "", id, escape(text))


def totals_line(totals: dict[str, Any]) -> str:
    """'reached 186 of 189: 3 red, 12 triaged, 171 green, 3 unreached; 312 s, 2 jobs on 2 cores'."""
    words = ", ".join(f"{totals[status]} {status}" for status in ("red", "triaged", "green", "unreached"))
    stale = f", {totals['stale']} stale entries" if totals["stale"] else ""
    jobs = f"{totals['jobs']} job{'s' if totals['jobs'] > 1 else ''} on {totals['cores']} cores"
    return f"reached {totals['reached']} of {totals['types']}: {words}{stale}; {totals['seconds']:.0f} s, {jobs}"
