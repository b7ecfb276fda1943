"""GradientMonitor: the gradient's norm, layer by layer."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmconform import structure
from lmconform.monitors.base import Moment, Monitor, number

if TYPE_CHECKING:
    from torch import Tensor, nn

VANISHED = 1e-6  # of the largest layer's norm; also the absolute norm below which nothing is learnt
EXPLODED = 100.0  # times the run's own median


class GradientMonitor(Monitor):
    """Norms by layer, before clipping: a layer whose gradient vanishes, a total that explodes or is not finite.

    A layer is a block of the repeated list (model.layers.3), or what lies outside it (embedding, head). Under fp16 in
    the Trainer the norms are those after clipping, since the gradients are scaled before.
    """

    wants_gradients = True
    wants_logits = True  # for the loss: a gradient that vanishes because everything is learnt is no fault

    def __init__(self, *, every: int = 10, stop: bool = False, log: str | Path | None = None) -> None:
        super().__init__(every=every, stop=stop, log=log)
        self._totals: list[float] = []
        self._layers: dict[str, str] = {}

    def observe(self, moment: Moment) -> dict[str, Any] | None:
        if moment.model is None:
            return None
        norms = self._norms_of(moment)
        if not norms:
            return None
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        if not total < float("inf"):
            worst = next(name for name, norm in norms.items() if not norm < float("inf"))
            self.warn(
                moment, "grad.exploding", f"the gradient of {worst} is NaN or infinite",
                "Look for an overflow in half precision, a division by a norm, a mask that hides a whole row, or a "
                "rate that is too large.", layer=worst,
            )  # fmt: skip
            return {"total": total, "layers": norms}
        usual = statistics.median(self._totals) if len(self._totals) >= 5 else None
        if usual is not None and self.lasting("explode", total > EXPLODED * usual, times=2):
            self.warn(
                moment, "grad.exploding",
                f"the gradient's norm is {total:.3g}, {total / usual:.0f} times its median so far ({usual:.3g})",
                "Lower the rate, lengthen the warm-up, or clip (clip_grad_norm_ to 1).", total=total, median=usual,
            )  # fmt: skip
        self._totals.append(total)
        loss, top = number(moment.loss), max(norms.values())
        learnt = loss is not None and loss < 0.1
        faint = {name: norm for name, norm in norms.items() if norm < VANISHED * max(top, 1.0 if not learnt else 0.0)}
        for name in norms:
            if self.lasting(f"vanish {name}", name in faint):
                self.warn(
                    moment, "grad.vanishing",
                    f"the gradient of {name} has norm {norms[name]:.2g}, the largest layer's is {top:.2g}",
                    "Look for a detach(), a saturated softmax or gate, a residual that is scaled away, or a layer that "
                    "the loss does not reach.", layer=name, norm=norms[name], largest=top,
                )  # fmt: skip
                break
        return {"total": total, "layers": norms}

    def _norms_of(self, moment: Moment) -> dict[str, float]:
        """One number a layer; a layer that has trainable parameters and no gradient at all counts as 0."""
        import torch

        assert moment.model is not None
        if not self._layers:
            self._layers = layer_names(moment.model)
        named = dict(moment.model.named_parameters())
        if moment.gradient_norms is not None:
            given = moment.gradient_norms
            names = [name for name in given if name in self._layers]
            norms = [given[name] for name in names]
        else:
            names = [name for name in self._layers if name in named and named[name].grad is not None]
            norms = _norms([named[name].grad for name in names])  # type: ignore[misc]
        squares = dict.fromkeys(self._layers.values(), 0.0)
        if not names:
            return {}
        for name, value in zip(names, torch.stack([n.float() for n in norms]).tolist(), strict=True):
            squares[self._layers[name]] += value**2
        return {layer: square**0.5 for layer, square in squares.items()}


def layer_names(module: nn.Module) -> dict[str, str]:
    """Trainable parameters to the layer they belong to: blocks.3, or the first parts of the name outside the blocks."""
    found = structure.blocks(module)
    prefix = found[0] + "." if found is not None else None
    layers = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if prefix and name.startswith(prefix):
            layers[name] = prefix + name[len(prefix) :].partition(".")[0]
        else:
            layers[name] = name.rpartition(".")[0] or name
    return layers


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each, in few kernels; sharded tensors one by one."""
    import torch
    from torch.distributed.tensor import DTensor

    if any(isinstance(tensor, DTensor) for tensor in tensors):
        return [t.norm().full_tensor() if isinstance(t, DTensor) else t.norm() for t in tensors]
    return list(torch._foreach_norm(tensors))
