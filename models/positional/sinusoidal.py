"""Sinusoidal position vectors added to the embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers import initialization as init

from models.layers import sinusoids
from models.positional.encoding import PositionEncoding


class Sinusoidal(PositionEncoding):
    """x + scale a PE(p), PE(p, 2i) = sin(p / base^(2i / d)), PE(p, 2i + 1) = cos(same), scale learned, initially 1.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.5; a is the amplitude (see `amplitude.py`). Closed form: no table,
    no longest length.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"base": 10_000.0, "amplitude": None}
    adds = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.size = config.hidden_size
        self.base = float(config.pe_options["base"])
        self.amplitude = float(config.pe_options["amplitude"])
        self.scale = nn.Parameter(torch.ones(1))

    def initialise(self, std: float) -> None:
        init.ones_(self.scale)

    def add(
        self,
        inputs_embeds: Tensor,
        input_ids: Tensor | None,
        position_ids: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
        embedding: nn.Module,
    ) -> Tensor:
        waves = self.amplitude * sinusoids(position_ids, self.size, self.base)
        return inputs_embeds + self.scale * waves.to(inputs_embeds.dtype)
