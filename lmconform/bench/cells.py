"""Every workload on a subject and its peer, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmconform.bench.pairing import Comparison, Task, compare
from lmconform.bench.workloads import WORKLOADS, Sizes
from lmconform.conventions import first_line
from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.bench.clocks import Clock
    from lmconform.specimen import Specimen


@dataclass
class Cell:
    """One workload on both: the comparison, or why there is none. Peaks in bytes, None where they were not measured."""

    name: str
    comparison: Comparison | None = None
    reason: str = ""
    broken: bool = False  # the subject raised, which is more than not having what the workload needs
    peak: int | None = None
    peer_peak: int | None = None


class _Raised(Unavailable):
    """A side's own error during a workload."""

    def __init__(self, side: Specimen, text: str) -> None:
        super().__init__(text)
        self.side = side


def measure(
    subject: Specimen, peer: Specimen, sizes: Sizes, names: Sequence[str], rounds: int, clock: Clock
) -> list[Cell]:
    """Every workload of `names` on both, with the same tokens, drawn from the smaller vocabulary."""
    smaller = min(subject, peer, key=lambda side: side.vocab_size)
    ids = smaller.probe_ids(sizes.batch, sizes.time)
    cells = []
    for name in names:
        cell = Cell(name)
        try:
            tasks = [_tried(side, name, ids, sizes.new) for side in (subject, peer)]
            cell.comparison = compare(*tasks, rounds=rounds, clock=clock)
        except Unavailable as reason:
            cell.reason = str(reason)
            cell.broken = isinstance(reason, _Raised) and reason.side is subject
        cells.append(cell)
        for side in (subject, peer):
            side.module.zero_grad(set_to_none=True)
    return cells


def _tried(side: Specimen, name: str, ids: Tensor, new: int) -> Task:
    """The workload, run once. Raises Unavailable, with the side's name, where it cannot do it."""
    try:
        task = WORKLOADS[name](side, ids, new)
        task.run(*task.prepare())
    except Unavailable as reason:
        raise Unavailable(f"{side.name}: {reason}") from reason
    except Exception as error:
        raise _Raised(side, f"{side.name}: {type(error).__name__}: {first_line(error)}") from error
    return task
