"""Widths that differ from the decoder's."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import initialization as init

from models.layers import SelfInitialised
from models.staged.config import StagedConfig


class WidthScaled(nn.Linear, SelfInitialised):
    """A linear map that keeps the scale of what it is given, whatever its width."""

    def initialise(self, std: float) -> None:
        init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            init.zeros_(self.bias)


def changed(config: StagedConfig, **fields: Any) -> StagedConfig:
    """A copy with other fields: what a rotary table or a mask is made from where they differ from the operators'."""
    made = copy.copy(config)
    for name, value in fields.items():
        setattr(made, name, value)
    return made
