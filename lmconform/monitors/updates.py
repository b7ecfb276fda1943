"""UpdateMonitor: how far one optimizer step moves the weights, relative to their size."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from lmconform.monitors.base import Moment, Monitor, number
from lmconform.monitors.gradients import layer_names

if TYPE_CHECKING:
    from torch import Tensor

DEAD = 1e-6  # of the weights' norm per step
IDLE = 0.02  # of the weights' norm over the whole run
HOT = 0.1
OVERWRITTEN = 3.0  # one step that leaves nothing of what the weights were
RISEN = 1.0  # nats above its lowest value


class UpdateMonitor(Monitor):
    """The update-to-weight ratio by layer: |step| / |weight|; 1e-3 is usual, 1e-6 learns nothing.

    The weights are copied at a step that is looked at and compared at the next one. Matrices only: biases and norms
    that start at 0 have no ratio. A large ratio alone is no fault (small models start so): the loss must have risen, or
    the step be three times as large as the weights.
    """

    wants_logits = True  # for the loss
    follows = True

    def __init__(self, *, every: int = 10, stop: bool = False, log: str | Path | None = None) -> None:
        super().__init__(every=every, stop=stop, log=log)
        self._before: dict[str, Tensor] | None = None
        self._lowest = float("inf")
        self._layers: dict[str, str] = {}
        self._last_loss: float | None = None

    def follow(self, moment: Moment) -> None:
        if self._before is None or moment.model is None:
            return
        before, self._before = self._before, None
        import torch

        named = dict(moment.model.named_parameters())
        names = [name for name in before if name in named]
        after = [named[name].detach() for name in names]
        old = [before[name] for name in names]
        moved = torch._foreach_norm(torch._foreach_sub(after, old))
        sizes = torch._foreach_norm(old)
        numbers = torch.stack([*(m.float() for m in moved), *(s.float() for s in sizes)]).tolist()
        layers: dict[str, list[float]] = {}
        for name, step, size in zip(names, numbers[: len(names)], numbers[len(names) :], strict=True):
            layers.setdefault(self._layers[name], []).append(step / size if size else 0.0)
        ratios = {layer: statistics.median(values) for layer, values in layers.items()}
        self._judge(moment, ratios)
        self.observations.append({"step": moment.step - 1, "layers": ratios})
        self._write({"step": moment.step - 1, "monitor": type(self).__name__, "layers": ratios})

    def observe(self, moment: Moment) -> None:
        """Copy the weights; the next step tells how far they moved."""
        loss = number(moment.loss)
        if loss is not None and loss == loss:
            self._lowest = min(self._lowest, loss)
        if moment.model is None:
            return
        if not self._layers:
            self._layers = layer_names(moment.model)
        self._before = {
            name: parameter.detach().clone()
            for name, parameter in moment.model.named_parameters()
            if parameter.requires_grad and parameter.dim() >= 2 and type(parameter.data).__name__ != "DTensor"
        }
        if not self._before:
            self._before = None
        self._last_loss = loss

    def _judge(self, moment: Moment, ratios: dict[str, float]) -> None:
        usual = statistics.median(ratios.values())
        loss = self._last_loss
        learnt = loss is not None and loss < 0.1
        reach = usual * moment.total if moment.total is not None else None
        dead = usual < DEAD and moment.step > 2 * self.every
        idle = reach is not None and reach < IDLE and moment.step > min(2 * self.every, (moment.total or 0) // 3)
        if self.lasting("dead", (dead or idle) and not learnt):
            whole = f"; the whole run of {moment.total} steps reaches {reach:.1%}" if reach is not None else ""
            self.warn(
                moment, "lr.too_small", f"a step moves the weights by {usual:.2g} of their size{whole}",
                "Raise the rate, or look at the schedule: which rate does the optimizer really use now "
                "(optimizer.param_groups[0]['lr'])? `lmconform sweep` finds the good range.",
                ratio=usual, reach=reach,
            )  # fmt: skip
        risen = loss is not None and (loss != loss or loss > self._lowest + RISEN)
        if self.lasting("hot", usual > HOT and risen, times=2) or not usual < OVERWRITTEN:
            rose = f", and the loss rose from {self._lowest:.3g} to {loss:.3g}" if risen else ""
            self.warn(
                moment, "lr.too_large", f"a step moves the weights by {usual:.2g} of their size{rose}",
                "Lower the rate, or warm up longer. `lmconform sweep` finds the good range.",
                ratio=usual, loss=loss, lowest_loss=self._lowest,
            )  # fmt: skip
