"""Expected failures as data: TOML tables, strict, each with a reason."""

from __future__ import annotations

import fnmatch
import functools
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from lmconform.registry import all_checks, unknown_id
from lmconform.results import Result, Status

KEYS = {"subject", "id", "reason", "link", "device", "dtype", "versions"}
RED = (Status.failed, Status.warned, Status.error)


class ExpectedError(ValueError):
    """An expected-failure file cannot be used (exit code 2); the text names the file and the entry."""


@dataclass(frozen=True)
class Expectation:
    """One check that is expected to fail on subjects whose name matches a glob."""

    subject: str
    id: str
    reason: str
    link: str
    device: str = ""
    dtype: str = ""
    versions: str = ""
    known: bool = False  # ships with lmconform

    def matches(self, names: Iterable[str], id: str, device: str, dtype: str) -> bool:
        return (
            self.id == id
            and any(fnmatch.fnmatchcase(name, self.subject) for name in names)
            and (not self.device or fnmatch.fnmatchcase(device, self.device + "*"))
            and (not self.dtype or self.dtype == dtype)
            and (not self.versions or _versions_match(self.versions))
        )


def read_expected(path: str | Path) -> list[Expectation]:
    """The entries of a file with `[[expected]]` tables.

    Raises ExpectedError for a missing file, bad TOML, an unknown key or check id (with the nearest), or an entry
    without a reason.
    """
    file = Path(path)
    if not file.is_file():
        raise ExpectedError(f"{path}: no such expected-failure file")
    return _entries(file.read_text(encoding="utf-8"), str(path), "expected", known=False)


def known_deviations() -> list[Expectation]:
    """The deviations of transformers that ship with lmconform."""
    return list(_shipped())


@functools.cache
def _shipped() -> list[Expectation]:
    found: list[Expectation] = []
    for file in sorted(resources.files("lmconform").joinpath("known").iterdir(), key=lambda item: item.name):
        if file.name.endswith(".toml"):
            found += _entries(file.read_text(encoding="utf-8"), f"lmconform/known/{file.name}", "deviation", known=True)
    return found


def _entries(text: str, place: str, table: str, *, known: bool) -> list[Expectation]:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ExpectedError(f"{place}: {error}") from error
    if strange := sorted(set(data) - {table}):
        raise ExpectedError(f"{place}: unknown table {', '.join(strange)}; entries are [[{table}]] tables")
    entries = data.get(table, [])
    if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
        raise ExpectedError(f"{place}: {table} = {entries!r}; entries are [[{table}]] tables")
    return [_entry(entry, f"{place}, entry {number}", known) for number, entry in enumerate(entries, 1)]


def _entry(entry: dict[str, Any], place: str, known: bool) -> Expectation:
    if strange := sorted(set(entry) - KEYS):
        raise ExpectedError(f"{place}: unknown key {', '.join(strange)}; known: {', '.join(sorted(KEYS))}")
    if missing := sorted({"subject", "id"} - set(entry)):
        raise ExpectedError(f"{place}: {' and '.join(missing)} missing")
    for key, value in entry.items():
        if not isinstance(value, str):
            raise ExpectedError(f"{place}: {key} = {value!r} is no string")
    if entry["id"] not in all_checks():
        raise ExpectedError(f"{place}: {unknown_id(entry['id'], all_checks())}")
    if not str(entry.get("reason", "")).strip():
        raise ExpectedError(f"{place} ({entry['id']}): write the reason; an expected failure without one is refused")
    if entry.get("versions"):
        _versions_match(entry["versions"], place)
    return Expectation(**{"link": "", **entry}, known=known)


def _versions_match(requirement: str, place: str = "") -> bool:
    """'transformers>=5.17,<5.30': whether the installed version is among them."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        wanted = Requirement(requirement)
    except InvalidRequirement as error:
        raise ExpectedError(f"{place}: versions = {requirement!r} is no requirement ({error})") from error
    try:
        return wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def apply(result: Result, expectations: Sequence[Expectation], names: Sequence[str], device: str, dtype: str) -> Result:
    """The result as expected failures make it: red becomes xfailed, green under a strict entry xpassed."""
    entry = next((e for e in expectations if e.matches(names, result.id, device, dtype)), None)
    if entry is None:
        return result
    kind = "known deviation of transformers" if entry.known else "expected"
    reason = f"{kind}: {entry.reason}" + (f" ({entry.link})" if entry.link else "")
    if result.status in RED:
        return replace(result, status=Status.xfailed, message=f"{reason}\n{result.message}")
    if result.status == Status.passed:
        if entry.known:  # sizes or versions differ: nothing for this user to mend
            return replace(result, message=f"{result.message}\nthe {kind} does not show here: {entry.reason}".strip())
        return replace(
            result, status=Status.xpassed, message=f"passed, though expected to fail: remove the entry ({entry.reason})"
        )
    return result


def draft(subject: str, results: Iterable[Result]) -> str:
    """An expected-failure file for these red results, reasons left empty for a person to fill."""
    lines = [
        "# Drafted by lmconform check --write-expected.",
        "# Fill every reason (and link): entries without a reason are refused.",
    ]
    for result in results:
        if result.status in RED:
            lines += [
                "", "[[expected]]", f"subject = {_quoted(subject)}", f'id = "{result.id}"', 'reason = ""', 'link = ""',
                *[f"# {line}" for line in result.message.splitlines()[:1]],
            ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
