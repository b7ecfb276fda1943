"""One row per type: what became of it, and what the rows say together."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lmconform.expected import Expectation
from lmconform.results import EXECUTED, FINDINGS, jsonable

STATUSES = ("red", "unreached", "triaged", "green")  # the order of the table
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc|MemoryError")


@dataclass
class Row:
    """One type. `failed` and `xfailed` hold check ids, `messages` the first line of what each of them said."""

    type: str
    status: str
    reason: str = ""
    failed: list[str] = field(default_factory=list)
    xfailed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    warned: list[str] = field(default_factory=list)
    messages: dict[str, str] = field(default_factory=dict)
    repro: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)  # known deviations of exactly this type that do not show
    not_shown: list[str] = field(default_factory=list)  # the same of entries for several types
    cut_short: bool = False  # by the time cap, the memory cap or its own death: resuming runs it again
    own_error: bool = False  # lmconform itself failed
    output: str = ""  # the last lines the type printed, where it did not come to its end
    build_seconds: float | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return jsonable(asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        return cls(**data)


@dataclass
class Course:
    """What a type's process reported, in order, until it ended (or died)."""

    built: float | None = None
    unbuilt: str = ""
    current: str = ""  # the check that was running last
    results: list[dict[str, Any]] = field(default_factory=list)
    crash: str = ""
    ended: bool = False

    def take(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "built":
                self.built = event["seconds"]
            case "unbuilt":
                self.unbuilt = event["reason"]
            case "checking":
                self.current = event["id"]
            case "result":
                self.results.append(event)
                self.current = ""
            case "crash":
                self.crash = event["reason"]
            case "end":
                self.ended = True

    @property
    def stage(self) -> str:
        """'while building', 'during cache.decode', 'between checks'."""
        if self.current:
            return f"during {self.current}"
        return "between checks" if self.built is not None else "while building"


def make_row(type: str, course: Course, *, seconds: float, death: str = "", output: str = "", memory: str = "") -> Row:
    """The row of a type whose process ended. `death` says how it died, `memory` names the cap for the messages."""
    row = Row(type, "green", seconds=round(seconds, 3))
    row.build_seconds = None if course.built is None else round(course.built, 3)
    row.counts = dict(Counter(result["status"] for result in course.results))
    for result in course.results:
        _enter(row, result, memory)
    if course.unbuilt:
        row.status, row.reason = "unreached", course.unbuilt
        if OUT_OF_MEMORY.search(course.unbuilt):
            row.cut_short, row.reason = True, _capped(course.unbuilt, memory)
        return row
    if course.crash:
        row.status, row.reason, row.own_error = "red", f"lmconform's own error: {course.crash}", True
        row.output = output
        return row
    if not course.ended:
        return _died(row, course, death, output)
    if row.failed:
        first = row.failed[0]
        more = f" (and {len(row.failed) - 1} more)" if len(row.failed) > 1 else ""
        row.status, row.reason = "red", f"{first}: {row.messages[first]}{more}"
    elif row.xfailed:
        row.status, row.reason = "triaged", "; ".join(dict.fromkeys(row.messages[id] for id in row.xfailed))
    elif not any(result["status"] in EXECUTED for result in course.results):
        row.status, row.reason = "unreached", "none of the selected checks applies"
    return row


def _enter(row: Row, result: dict[str, Any], memory: str) -> None:
    id, status = result["id"], result["status"]
    line = next(iter(result["message"].splitlines()), "")
    if status in FINDINGS:
        if OUT_OF_MEMORY.search(line):
            row.cut_short, line = True, _capped(line, memory)
        row.failed.append(id)
        row.repro[id] = result["repro"]
    elif status == "xfailed":
        row.xfailed.append(id)
    elif status == "warned":
        row.warned.append(id)
    if status in FINDINGS or status in ("xfailed", "warned"):
        row.messages[id] = line
    if result["known"]:
        (row.stale if result["known"] == "exact" else row.not_shown).append(id)
    row.own_error = row.own_error or result["own_error"]
    row.timings[id] = round(result["seconds"], 3)


def _died(row: Row, course: Course, death: str, output: str) -> Row:
    row.cut_short, row.output = True, output
    row.reason = f"{death} {course.stage}"
    if course.built is None:
        row.status = "unreached"
        return row
    row.status = "red"
    if course.current:
        row.failed.append(course.current)
        row.messages[course.current] = death
        row.counts["error"] = row.counts.get("error", 0) + 1
    return row


def _capped(line: str, memory: str) -> str:
    return f"{line} (--memory: {memory})" if memory else line


def totals(rows: Sequence[Row], seconds: float, cores: int, jobs: int) -> dict[str, Any]:
    """The figures of a run. `seconds` is wall-clock of this run; `type_seconds` the sum over all rows."""
    counts = Counter(row.status for row in rows)
    checks: Counter[str] = Counter()
    for row in rows:
        checks.update(row.counts)
    return {
        "types": len(rows),
        "reached": len(rows) - counts["unreached"],
        **{status: counts[status] for status in STATUSES},
        "stale": sum(len(row.stale) for row in rows),
        "checks": dict(checks),
        "seconds": round(seconds, 1),
        "type_seconds": round(sum(row.seconds for row in rows), 1),
        "cores": cores,
        "jobs": jobs,
    }


def red_by_check(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The red types of each failed check, the check with the most types first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        for id in row.failed:
            found.setdefault(id, []).append(row)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def names_one_type(entry: Expectation) -> bool:
    """Whether a known deviation is about one type exactly: then the zoo is strict about it."""
    return not any(character in entry.subject for character in "*?[")


def idle_entries(rows: Sequence[Row], known: Sequence[Expectation], types: Iterable[str]) -> list[str]:
    """A note for every known deviation of several types that showed nowhere, or of a type that does not exist."""
    notes: list[str] = []
    there = {f"transformers:{type}" for type in types}
    for entry in known:
        if names_one_type(entry):
            if entry.subject not in there:
                notes.append(f"known deviation {entry.id} of {entry.subject}: transformers has no such type here")
            continue
        matching = [row for row in rows if fnmatch.fnmatchcase(f"transformers:{row.type}", entry.subject)]
        shown = any(entry.id in row.xfailed for row in matching)
        if not shown and any(entry.id in row.not_shown for row in matching):
            notes.append(f"known deviation {entry.id} of {entry.subject}: showed in no type of this run")
    return notes
