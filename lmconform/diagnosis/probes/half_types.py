"""A half copy drifts from float64: the shortest stretch of its code that must compute in float32 for that to end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmconform.context import Context
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.diagnosis.probes.in_float32 import Site, Sites, in_float32, noted
from lmconform.measuring import drift
from lmconform.measuring.rounding import Choices, in_type, traced
from lmconform.registry import get_check

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmconform.specimen import Specimen

ENOUGH = 0.75  # of the bound: what transformers' types drift by at most, with nothing wrong
SUMS, POSITIONS, OVERFLOW = "dtype.low_precision", "position.low_precision", "dtype.overflow"


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """What the check of bfloat16 measures, again with parts in float32; of float16 where bfloat16 does not drift."""
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        context = Context(get_check(f"precision.{_name(dtype)}"), subject, seed=seed)
        ids, other = (context.ids(2, subject.longest(drift.TIME), salt) for salt in (0, 1))
        drifting = _drifting(in_type(subject, dtype), dtype, ids)
        if drifting is not None:
            return _found(drifting, dtype, ids, other)
    return []


def _found(drifting: _Drifting, dtype: torch.dtype, ids: Tensor, other: Tensor) -> list[Finding]:
    sites = Sites(dtype)
    before = drifting.ratio(noted(sites))
    shortest = _shortest(len(sites.calls), lambda part: drifting.ratio(in_float32(part, sites)))
    if shortest is None:
        return []
    part, after = shortest
    stretch = list(sites.calls.items())[part.start : part.stop]
    (_, first), (end, last) = stretch[0], stretch[-1]
    what = f"{first} computed in float32:" if len(stretch) == 1 else f"computed in float32 from {first} to {last},"
    where = f"{what} the drift in {_name(dtype)} falls from {before:.2g} to {after:.2g} times the bound"
    cause = POSITIONS if _of_positions_alone(drifting.half, dtype, end, ids, other) else SUMS
    others = [each for each in (SUMS, POSITIONS, OVERFLOW) if each != cause]
    return [Finding(cause, Verdict.cured, where), *(Finding(each, Verdict.ruled_out) for each in others)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class _Drifting:
    """A half copy whose logits in this run are finite, and drift from the reference's."""

    half: Specimen
    run: drift.Run
    reference: tuple[Choices, Tensor]
    noise: tuple[float, float]

    def ratio(self, within: AbstractContextManager[object] | None = None) -> float:
        """The drift in bounds, as the check tells it: the first that is above its bound, or the larger."""
        choices, expected = self.reference
        with choices.mode(replay=True), within or nullcontext():  # in this order: the latter looks at its callers
            logits = self.run(self.half)
        ratios = [size / bound for size, bound, _ in drift.drifts(logits, expected, self.noise)]
        return next((ratio for ratio in ratios if ratio > 1), max(ratios))


def _drifting(half: Specimen, dtype: torch.dtype, ids: Tensor) -> _Drifting | None:
    """The first of the check's runs that drifts; None where none does, or one before it gives no finite numbers."""
    runs = drift.runs(half, ids)
    exact, references = drift.references(half, runs)
    noise: tuple[float, float] | None = None
    for what, run in runs.items():
        try:
            with references[what][0].mode(replay=True), traced(half.module) as trace:
                logits = run(half)
        except Exception:  # of this type that is what is wrong; the other may drift
            return None
        if not bool(logits.isfinite().all()):
            return None
        noise = noise or drift.noise(exact, dtype, trace.outside(dtype), run, references[what])
        found = _Drifting(half, run, references[what], noise)
        if found.ratio() > 1:
            return found
    return None


def _shortest(count: int, ratio: Callable[[range], float]) -> tuple[range, float] | None:
    """Of places 0 to count - 1 those that suffice, the latest start, then the earliest end; and the drift left then."""
    after = ratio(range(count))
    if not after <= ENOUGH:
        return None
    start, beyond = 0, count  # from `start` on suffices, from `beyond` on does not
    while beyond - start > 1:
        middle = (start + beyond) // 2
        left = ratio(range(middle, count))
        if left <= ENOUGH:
            start, after = middle, left
        else:
            beyond = middle
    short, stop = start, count  # up to `stop` suffices, up to `short` does not
    while stop - short > 1:
        middle = (short + stop) // 2
        left = ratio(range(start, middle))
        if left <= ENOUGH:
            stop, after = middle, left
        else:
            short = middle
    return range(start, stop), after


def _of_positions_alone(half: Specimen, dtype: torch.dtype, site: Site, ids: Tensor, other: Tensor) -> bool:
    """Whether what the site gives is the same for other tokens, and of another shape for fewer."""
    import torch

    made = []
    for given in (ids, other, ids[:, :-1]):
        sites = Sites(dtype, watched=site)
        with noted(sites):
            half.logits(given)
        made.append(sites.seen)
    known, again, fewer = made
    if not known or [each.shape for each in known] == [each.shape for each in fewer]:
        return False
    return len(known) == len(again) and all(torch.equal(one, two) for one, two in zip(known, again))
