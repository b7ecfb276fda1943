"""What a run says: statuses, one Result per check, and the Report that holds them all."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from lmconform import charts
from lmconform.charts import Chart

SCHEMA_VERSION = 1


class Status(StrEnum):
    """How one check ended. The words are public (spec, "Public interface")."""

    passed = "passed"
    failed = "failed"
    warned = "warned"
    not_applicable = "not_applicable"
    blocked = "blocked"
    xfailed = "xfailed"
    xpassed = "xpassed"
    not_run = "not_run"
    error = "error"


EXECUTED = frozenset({"passed", "failed", "warned", "xfailed", "xpassed", "error"})
FINDINGS = frozenset({"failed", "error", "xpassed", "not_run"})


@dataclass
class Result:
    """One check on one subject.

    `measured`, `allowed` and `margin` (measured / allowed; above 1 is red) are numbers or None where the check
    decides without a number; on green they are those of the tightest comparison.
    """

    id: str
    family: str
    severity: str
    status: Status
    measured: float | None = None
    allowed: float | None = None
    margin: float | None = None
    message: str = ""
    where: str = ""
    repro: str = ""
    seconds: float = 0.0
    suspects: tuple[str, ...] = ()  # ids of the causes that this check's own measurement points at, likeliest first
    charts: tuple[Chart, ...] = ()  # what it measured by position, layer, rate or step

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as in JSON; the key charts is there only where the check has some."""
        plain = [field.name for field in fields(self) if field.name != "charts"]
        data = {name: jsonable(getattr(self, name)) for name in plain}
        if self.charts:
            data["charts"] = [jsonable(charts.to_dict(chart)) for chart in self.charts]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        data = dict(data, status=Status(data["status"]))
        data["suspects"] = tuple(data.get("suspects", ()))
        data["charts"] = tuple(charts.from_dict(chart) for chart in data.get("charts", ()))
        for key in ("measured", "allowed", "margin", "seconds"):
            if isinstance(data.get(key), str):
                data[key] = float(data[key])
        return cls(**data)


@dataclass
class Cause:
    """A likely cause of the red checks: what a person wants to know (ranked by a later diagnosis)."""

    id: str
    score: float
    summary: str
    evidence: list[dict[str, Any]] = field(default_factory=list)
    where: str = ""
    confirm: str = ""
    mend: str = ""


@dataclass
class Report:
    """All results of one subject, in the order in which the checks ran."""

    subject: str
    profile: str
    device: str
    dtype: str
    seed: int
    versions: dict[str, str]
    results: list[Result] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    strict: bool = False
    died: str = ""

    @property
    def ok(self) -> bool:
        """Something ran, and nothing failed (nor warned, when strict)."""
        red = any(result.status in FINDINGS for result in self.results) or (self.strict and bool(self.warned))
        ran = any(result.status in EXECUTED for result in self.results)
        return ran and not red and not self.died

    @property
    def failed(self) -> list[Result]:
        """Every finding: failed, error, unexpectedly passed, or not run for want of time."""
        return [result for result in self.results if result.status in FINDINGS]

    @property
    def warned(self) -> list[Result]:
        return [result for result in self.results if result.status == Status.warned]

    @property
    def counts(self) -> dict[str, int]:
        counts = {status.value: 0 for status in Status}
        for result in self.results:
            counts[result.status] += 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "spec_version": _spec_version(),
            "subject": self.subject,
            "profile": self.profile,
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.seed,
            "versions": dict(self.versions),
            "ok": self.ok,
            "counts": self.counts,
            "results": [result.to_dict() for result in self.results],
            "causes": [jsonable(asdict(cause)) for cause in self.causes],
            "notes": list(self.notes),
            "strict": self.strict,
            "died": self.died,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        return cls(
            subject=data["subject"],
            profile=data["profile"],
            device=data["device"],
            dtype=data["dtype"],
            seed=data["seed"],
            versions=data["versions"],
            results=[Result.from_dict(result) for result in data["results"]],
            causes=[Cause(**cause) for cause in data["causes"]],
            notes=data.get("notes", []),
            strict=data.get("strict", False),
            died=data.get("died", ""),
        )

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form; the file appears whole or not at all."""
        write_whole(path, as_json(self.to_dict()))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML page; the file appears whole or not at all."""
        from lmconform.report.html import render

        write_whole(path, render([self]))


def jsonable(value: Any) -> Any:
    """Plain types only. JSON has no NaN or infinity: such numbers become the strings "nan", "inf", "-inf"."""
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def as_json(data: Any) -> str:
    """Indented JSON in which a list of numbers takes one line."""
    text = json.dumps(data, indent=2) + "\n"
    # a line break inside a string is escaped, so these brackets are a list's own
    return re.sub(r"\[\s+([-+.\de,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write beside the target, then move into place, so that a reader never sees half a file."""
    target = Path(path)
    with tempfile.NamedTemporaryFile(
        "w", dir=target.parent, prefix=target.name, suffix=".part", delete=False, encoding="utf-8"
    ) as part:
        part.write(text)
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(part.name, 0o666 & ~mask)
    os.replace(part.name, target)


PROCESS = ("the process ", "did not end within", "the subject could not be built", "ran out of memory")


UNMEASURED = "lmconform could not measure it on what the model gave: "


def of_the_instrument(result: Result) -> bool:
    """Whether an error was raised by lmconform's own code: it says nothing of what is wrong with the model."""
    return result.status == Status.error and result.message.startswith(UNMEASURED)


def of_the_process(result: Result) -> bool:
    """Whether an error tells of the process (a crash, a hang, want of memory), not of what the model computes."""
    return result.status == Status.error and result.message.startswith(PROCESS)


def tally(counts: dict[str, int]) -> str:
    """'38 passed, 2 failed, 5 not_applicable': the ledger in one line, zeroes left out."""
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "nothing ran"


def worst(results: Iterable[Result]) -> Result | None:
    """The result with the largest margin."""
    return max((r for r in results if r.margin is not None), key=lambda r: r.margin or 0.0, default=None)


def _spec_version() -> int:
    from lmconform import SPEC_VERSION

    return SPEC_VERSION
