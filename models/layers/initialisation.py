"""How weights start, and what a module declares about its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init


class ResidualProjection(nn.Linear):
    """A linear map whose output is added to the residual stream: it starts smaller the deeper the model is."""


class SelfInitialised(nn.Module, ABC):
    """A module that fills its own parameters and buffers, after meta-device construction too.

    `initialise` writes through `transformers.initialization`, which leaves alone what a checkpoint has filled.
    """

    @abstractmethod
    def initialise(self, std: float) -> None:
        """Fill what belongs to this module alone; `std` is the config's initializer_range."""


class ExactBuffers(nn.Module):
    """Buffers keep their number type when the model is cast: `.half()` moves them and leaves their digits alone."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactBuffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, exact in before.items():
            moved = self._buffers[name]
            if exact is not None and moved is not None and moved.dtype != exact.dtype:
                self._buffers[name] = exact.to(moved.device)
        return self


@torch.no_grad()
def initialise(module: nn.Module, std: float, layers: int) -> None:
    """One module's weights: normal(0, std), residual projections by 1 / sqrt(2 layers) less (GPT-2), norms at 1, 0."""
    if isinstance(module, SelfInitialised):
        module.initialise(std)
    elif isinstance(module, nn.Linear):
        init.normal_(
            module.weight, mean=0.0, std=std / (2 * layers) ** 0.5 if isinstance(module, ResidualProjection) else std
        )
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, mean=0.0, std=std)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        if module.weight is not None:
            init.ones_(module.weight)
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            init.zeros_(module.bias)
