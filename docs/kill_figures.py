"""What the measured kill matrix says: detection, the diagnosis' accuracy on both halves, calibration, cost.

The planted faults are split in two halves by mechanism: all faults that have one cause and are named first by one check
go together, into the half that the SHA-256 of "CAUSE/CHECK" picks. The weights of the ranking are fitted on the tuning
half alone. docs/kills.toml keeps what was reached on the other half before any of its errors was looked at.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from lmconform.diagnosis.catalogue import catalogue
from lmconform.diagnosis.probes import Finding, Verdict
from lmconform.diagnosis.ranking import WEIGHTS, Evidence, Weights, rank
from lmconform.expected import Expectation, apply, known_deviations
from lmconform.results import Result

if TYPE_CHECKING:
    from fixtures.faults import Fault

RED = ("failed", "warned", "error")
PAIRS = 50
BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)


def mechanism_group(fault: Fault) -> str:
    """Faults of one group are variants of one another: same cause, told by the same check."""
    return f"{fault.cause}/{fault.kills[0]}"


def tuning(fault: Fault) -> bool:
    """Whether the fault is in the half that was tuned on; the other half is held back."""
    return digest(mechanism_group(fault)) % 2 == 0


@functools.cache
def last() -> dict[str, str]:
    """The faults that came last, each set measured once before the diagnosis was tuned on any: in neither half.

    Ids, and the name of the set.
    """
    from fixtures.faults import held_out, held_out_modern, held_out_ports, held_out_reported

    sets = {
        "held out": held_out.FAULTS,
        "held out, ports": held_out_ports.FAULTS,
        "held out, modern": held_out_modern.FAULTS,
        "held out, reported": held_out_reported.FAULTS,
    }
    return {fault.id: name for name, faults in sets.items() for fault in faults}


def digest(text: str) -> int:
    """A number that is the same on every machine and has no order to it."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


@dataclass
class Judged:
    """One planted fault, what was seen of it and what the diagnosis made of that."""

    fault: Fault
    results: list[Result]
    evidence: Evidence
    causes: list[tuple[str, float]]
    seconds: float
    diagnosis_seconds: float

    @property
    def red(self) -> list[str]:
        return list(self.evidence.red)

    @property
    def place(self) -> int:
        """0 where the right cause is named first; 99 where it is not named."""
        right = {self.fault.cause, *self.fault.also}
        return next((place for place, (cause, _) in enumerate(self.causes) if cause in right), 99)


def results_of(row: dict[str, Any]) -> list[Result]:
    """A row's results, transformers' known deviations taken out, as in every run.

    By the host's name: a fault that replaces the model's class hides the type that the deviations go by.
    """
    names = [f"transformers:{row['host']}"]
    return [apply(Result.from_dict(result), known(), names, "cpu", "float32") for result in row["results"]]


@functools.cache
def known() -> list[Expectation]:
    return known_deviations()


def evidence_of(row: dict[str, Any]) -> Evidence:
    """The evidence that a measured row holds."""
    findings = [Finding(cause, Verdict(verdict), where) for cause, verdict, where in row.get("findings", ())]
    return Evidence.of(results_of(row), findings)


def judge(faults: Iterable[Fault], rows: dict[str, dict[str, Any]], weights: Weights = WEIGHTS) -> list[Judged]:
    """Every fault that was measured, ranked anew."""
    judged = []
    for fault in faults:
        if fault.id not in rows:
            continue
        row = rows[fault.id]
        evidence = evidence_of(row)
        ranked = rank(catalogue().values(), evidence, 5, weights)
        judged.append(
            Judged(
                fault,
                results_of(row),
                evidence,
                [(cause.id, score) for cause, score in ranked],
                row["seconds"],
                row.get("diagnosis_seconds", 0.0),
            )
        )
    return judged


def share(judged: Sequence[Judged], within: int) -> float:
    """How many have the right cause among the first `within`."""
    return sum(one.place < within for one in judged) / len(judged) if judged else math.nan


def interval(judged: Sequence[Judged], within: int, draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of `share`, bootstrapped over mechanisms: variants of one fault are no independent trials."""
    import numpy

    groups: dict[str, list[int]] = {}
    for one in judged:
        groups.setdefault(mechanism_group(one.fault), []).append(one.place < within)
    hits = numpy.array([sum(group) for group in groups.values()])
    sizes = numpy.array([len(group) for group in groups.values()])
    drawn = numpy.random.default_rng(0).integers(len(hits), size=(draws, len(hits)))
    shares = hits[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = numpy.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


def reliability(judged: Sequence[Judged]) -> list[tuple[float, float, int, float, float]]:
    """(from, to, how many, mean score, share right) for the scores of the first cause."""
    table = []
    for low, high in pairwise(BINS):
        inside = [one for one in judged if one.causes and low < one.causes[0][1] <= high]
        if inside:
            said = sum(one.causes[0][1] for one in inside) / len(inside)
            table.append((low, high, len(inside), said, share(inside, 1)))
    return table


def cost(judged: Sequence[Judged]) -> tuple[float, float]:
    """Diagnosis time over the time of the checks: of all red runs together, and the median run's."""
    red = [one for one in judged if one.red and one.diagnosis_seconds]
    if not red:
        return math.nan, math.nan
    whole = sum(one.diagnosis_seconds for one in red) / sum(one.seconds for one in red)
    return whole, median(one.diagnosis_seconds / one.seconds for one in red)


def named_both(pairs: dict[str, tuple[Fault, Fault]], rows: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """For the first 50 pairs in which both faults show, whether both causes are among the first three."""
    told: dict[str, bool] = {}
    for id, both in pairs.items():
        if id not in rows or len(told) == PAIRS:
            continue
        evidence = evidence_of(rows[id])
        if any(fault.kills[0] not in evidence.red for fault in both):
            continue
        first = {cause.id for cause, _ in rank(catalogue().values(), evidence, 3)}
        told[id] = all(first & {fault.cause, *fault.also} for fault in both)
    return told
