"""How far the logits of a half copy drift from those of float64, held against what rounding explains.

The float64 copy holds the same, rounded weights. What rounding explains is measured on it: every submodule's output is
rounded to the type, and the logits move by so much; recurrences are part of that run. Experts chosen in float64 are
replayed in every other run, since nearly equal ones change places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from lmconform.conventions import first_line
from lmconform.measuring.exercises import padded
from lmconform.measuring.rounding import SAMPLES, Choices, in_type, rounded
from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmconform.specimen import Specimen

TIME = 40
# Over all of transformers' types the 90th percentile of the drift is 0.4 to 1.8 times that of the noise (but for BLT),
# and the worst token 0.1 to 1.6 times the worst noise.
TYPICAL, WORST = 2.5, 4.0

Run = Callable[["Specimen"], "Tensor"]


def runs(subject: Specimen, ids: Tensor) -> dict[str, Run]:
    """The forwards that are compared, each by what its logits are called."""
    found: dict[str, Run] = {"": lambda model: model.logits(ids)}
    if subject.can("mask"):
        found[" of left-padded rows"] = lambda model: padded(model, ids)
    return found


def references(half: Specimen, runs: Mapping[str, Run]) -> tuple[Specimen, dict[str, tuple[Choices, Tensor]]]:
    """The same weights in float64, or where that does not run, float32: the logits and the experts chosen.

    Raises Unavailable where neither runs.
    """
    import torch

    for dtype in (torch.float64, torch.float32):
        found: dict[str, tuple[Choices, Tensor]] = {}
        try:
            exact = in_type(half, dtype)  # MPS has no float64
            for what, run in runs.items():
                choices = Choices()
                with choices.mode(replay=False):
                    found[what] = choices, run(exact)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            continue
        if all(bool(logits.isfinite().all()) for _, logits in found.values()):
            return exact, found
        reason = "its logits are not finite"
    raise Unavailable(f"weights that were rounded to the type do not run in float64 or float32: {reason}")


def noise(
    exact: Specimen, dtype: torch.dtype, left: frozenset[str], run: Run, reference: tuple[Choices, Tensor]
) -> tuple[float, float]:
    """What rounding alone does: to most tokens (the 90th percentile), and to the worst.

    `left` are the modules that give another type by themselves, and are not rounded.
    """
    import torch

    choices, expected = reference
    moved = []
    for sample in range(SAMPLES):
        with choices.mode(replay=True):
            moved.append((rounded(exact, dtype, left, sample, run).double() - expected.double()).abs().amax(-1))
    found = torch.stack(moved).flatten()
    found = found[found.isfinite()]
    floor = torch.finfo(dtype).eps * float(expected.abs().max())
    if not found.numel():
        return floor, floor
    return max(float(found.quantile(0.9)), floor), max(float(found.max()), floor)


def drifts(logits: Tensor, expected: Tensor, noise: tuple[float, float]) -> Iterator[tuple[float, float, str]]:
    """The drift of most tokens and of the worst: how large, how large it may be, and which and where that is."""
    drift = (logits.double() - expected.double()).abs().amax(-1)
    row, position = divmod(int(drift.argmax()), drift.shape[-1])
    place = f"the largest at row {row}, position {position}"
    yield float(drift.flatten().quantile(0.9)), TYPICAL * noise[0], f"most tokens, {place}"
    yield float(drift.max()), WORST * noise[1], f"the worst token, {place}"
