"""What a probe says of a cause."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How much a probe's outcome says; lmconform.diagnosis.ranking gives each its weight."""

    cured = "cured"  # the suspected fault was undone from outside, and the error was gone
    seen = "seen"  # the probe measured what this cause does and others do not
    agrees = "agrees"
    against = "against"
    ruled_out = "ruled_out"  # the experiment leaves no room for it
    place = "place"  # says nothing for or against the cause, only where to look if it is the one


@dataclass(frozen=True)
class Finding:
    """One cause, the verdict, and in words where the fault is or what undid it ("" where nothing is known)."""

    cause: str
    verdict: Verdict
    where: str = ""
