"""Finished rows on disk while the zoo runs, so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import IO, Any

from lmconform.zoo.rows import Row

SETTINGS = ("profile", "select", "deselect", "device", "seed", "known")  # what a verdict depends on, with the versions


class ResumeError(ValueError):
    """There is nothing to resume, or it cannot be read (exit code 2)."""


def journal_of(report: Path) -> Path:
    return report.with_name(report.name + ".journal.jsonl")


def source_digest() -> str:
    """Eight digits over lmconform's modules and tables: while lmconform is edited, its version stays the same."""
    digest = hashlib.sha256()
    root = Path(str(resources.files("lmconform")))
    for file in sorted(root.rglob("*")):
        inside = file.relative_to(root)
        if file.suffix in (".py", ".toml") and inside.parts[0] not in ("report", "zoo"):  # those decide nothing
            digest.update(str(inside).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


class Journal:
    """The rows of this run, one JSON line each; before them a line with what they depend on.

    Kept until the report is written whole. Rows taken over from an earlier run are in it too, so that a second
    interruption loses nothing.
    """

    def __init__(self, report: Path, run: dict[str, Any], rows: list[Row]) -> None:
        self.path = journal_of(report)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(_line(entry) for entry in [{"run": run}, *map(_entry, rows)]), encoding="utf-8")
        part.replace(self.path)
        self._file: IO[str] = self.path.open("a", encoding="utf-8")

    def add(self, row: Row) -> None:
        self._file.write(_line(_entry(row)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _entry(row: Row) -> dict[str, Any]:
    return {"row": row.to_dict()}


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def read_earlier(report: Path) -> tuple[dict[str, Any], list[Row]]:
    """What an earlier run depended on, and its finished rows: from its journal, else from its report.

    Raises ResumeError.
    """
    journal = journal_of(report)
    if journal.is_file():  # newer than any report beside it
        return _read_journal(journal)
    if not report.is_file():
        raise ResumeError(f"nothing to resume: there is neither {report} nor {journal.name} beside it")
    try:
        data = json.loads(report.read_text(encoding="utf-8"))
        return data["run"], [Row.from_dict(row) for row in data["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{report} is no report of lmconform zoo ({type(error).__name__}: {error})") from error


def _read_journal(path: Path) -> tuple[dict[str, Any], list[Row]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    whole = lines[:-1]  # what follows the last newline was cut off in the middle
    try:
        entries = [json.loads(line) for line in whole]
        return entries[0]["run"], [Row.from_dict(entry["row"]) for entry in entries[1:]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ResumeError(f"{path} is no journal of lmconform zoo ({type(error).__name__}: {error})") from error


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What keeps earlier rows from standing for this run: 'profile smoke, now default'."""
    found: list[str] = []
    for name in SETTINGS:
        if earlier.get(name) != now[name]:
            found.append(f"{name} {_shown(earlier.get(name))}, now {_shown(now[name])}")
    before, after = earlier.get("versions", {}), now["versions"]
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            found.append(f"{name} {_shown(before.get(name))}, now {_shown(after.get(name))}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value) or "none"
    return "none" if value is None else str(value)
