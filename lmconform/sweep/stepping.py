"""One step of stacked members: as the model is written, and from its recording once that is known to be the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lmconform.sweep.recording import Unrecordable, record
from lmconform.sweep.stacking import Vectorised

if TYPE_CHECKING:
    from torch import Tensor

WORTH = 40  # steps that must be left: recording takes as long as some ten, and spares a third of each


class Stepping:
    """Losses and gradients, step by step. `reason` says why nothing is recorded."""

    def __init__(self, run: Vectorised) -> None:
        self.run = run
        self.reason = ""
        self.recorded: Callable[[], Tensor] | None = None
        self.trusted = False
        self.buffers: tuple[Tensor, ...] = ()

    @property
    def room(self) -> float:
        """The share of the members that are still alive at which it pays to make the stack smaller."""
        return 0.5 if self.trusted else 0.99

    def step(
        self, flat: Tensor, gradient: Tensor, ids: Tensor, targets: Tensor, shared: bool, left: int
    ) -> Tensor:  # fmt: skip
        """The losses [members] of the weights `flat` [members, size]; the gradients are written to `gradient`.

        `left`: steps to come, this one included.
        """
        if self.recorded is not None and not self._fits(flat, gradient, ids, targets):
            self.recorded, self.trusted = None, False
        if self.recorded is None:
            if not self.reason and left >= WORTH:
                return self._record(flat, gradient, ids, targets, shared)
            return self._plain(flat, gradient, ids, targets, shared)
        self.buffers[2].copy_(ids)
        self.buffers[3].copy_(targets)
        if self.trusted:
            return self.recorded()
        return self._compared(flat, gradient, ids, targets, shared)

    def _fits(self, flat: Tensor, gradient: Tensor, ids: Tensor, targets: Tensor) -> bool:
        mine = self.buffers
        return mine[0] is flat and mine[1] is gradient and mine[2].shape == ids.shape and mine[3].shape == targets.shape

    def _plain(self, flat: Tensor, gradient: Tensor, ids: Tensor, targets: Tensor, shared: bool) -> Tensor:
        losses, found = self._found(flat, ids, targets, shared)
        self._into(gradient, found)
        return losses

    def _found(self, flat: Tensor, ids: Tensor, targets: Tensor, shared: bool) -> tuple[Tensor, list[Tensor]]:
        assert self.run.layout is not None
        return self.run.losses_and_gradients(self.run.layout.views(flat), ids, targets, shared)

    def _into(self, gradient: Tensor, found: list[Tensor]) -> None:
        assert self.run.layout is not None
        for place, given in zip(self.run.layout.views(gradient).values(), found, strict=True):
            place.copy_(given)

    def _record(self, flat: Tensor, gradient: Tensor, ids: Tensor, targets: Tensor, shared: bool) -> Tensor:
        assert self.run.layout is not None
        own = ids.clone(), targets.clone()
        into = list(self.run.layout.views(gradient).values())
        try:
            (losses, found), self.recorded = record(
                lambda: self._found(flat, *own, shared), [flat, *own], into
            )  # fmt: skip
        except Exception as error:  # an operation that cannot be watched: what is the model's own fault is raised below
            self.reason = str(error) if isinstance(error, Unrecordable) else f"{type(error).__name__}: {error}"
            return self._plain(flat, gradient, ids, targets, shared)
        self.buffers = (flat, gradient, *own)
        self._into(gradient, found)
        return losses

    def _compared(self, flat: Tensor, gradient: Tensor, ids: Tensor, targets: Tensor, shared: bool) -> Tensor:
        """The step after the recorded one, with other weights, both ways: they must agree bit for bit."""
        import torch

        assert self.recorded is not None
        again = self.recorded()
        replayed = gradient.clone()
        losses = self._plain(flat, gradient, ids, targets, shared)
        same = torch.equal(losses.nan_to_num(), again.nan_to_num())
        if same and torch.equal(gradient.nan_to_num(), replayed.nan_to_num()):
            self.trusted = True
        else:
            self.recorded, self.reason = None, "the recorded step gives other numbers than the model"
        return losses
