"""Where the weights of stacked members lie: one row [size] for each, and in it every parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the trained parameters; `orders`: each one's dimensions, the slowest-running first.

    AdamW does not care in which order it meets the numbers. A parameter that lies as its gradient comes out of
    backward (a linear layer's comes out transposed) spares a copy, and its matrix product is the faster kind.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    orders: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, module: nn.Module, gradients: Sequence[Tensor]) -> Layout:
        """The layout of these stacked gradients [members, ...], in the order of the module's trained parameters."""
        named = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        orders = [
            tuple(sorted(range(gradient.dim() - 1), key=lambda axis: -gradient.stride(axis + 1)))
            for gradient in gradients
        ]
        return cls(tuple(named), tuple(weight.shape for weight in named.values()), tuple(orders))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Parameters by name, [members, ...], as views of `flat` [members, size]."""
        parts = flat.detach().split([shape.numel() for shape in self.shapes], dim=1)
        made: dict[str, Tensor] = {}
        for name, shape, order, part in zip(self.names, self.shapes, self.orders, parts, strict=True):
            if not shape:
                made[name] = part[:, 0]
                continue
            stored = part.unflatten(1, [shape[axis] for axis in order])
            made[name] = stored.permute(0, *(order.index(axis) + 1 for axis in range(len(shape))))
        return made

    def stacked(self, modules: Sequence[nn.Module]) -> Tensor:
        """The weights of these modules, [members, size]."""
        import torch

        first = modules[0].get_parameter(self.names[0])
        size = sum(shape.numel() for shape in self.shapes)
        flat = torch.empty(len(modules), size, dtype=first.dtype, device=first.device)
        for name, view in self.views(flat).items():
            for place, module in zip(view, modules, strict=True):
                place.copy_(module.get_parameter(name).detach())
        return flat
