"""Attention with linear biases."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers import initialization as init

from models.layers import ExactBuffers
from models.positional.encoding import PositionEncoding, distances


def slopes(heads: int) -> Tensor:
    """m_h = 2^(-8h / H), h = 1 ... H, for H a power of two: [heads] in float32.

    For other H (the paper's footnote and code): the slopes of the next lower power of two, then every other one of the
    next higher.
    """
    lower = 2 ** math.floor(math.log2(heads))
    own = 2.0 ** (-8.0 * torch.arange(1, lower + 1, dtype=torch.float64) / lower)
    between = 2.0 ** (-8.0 * torch.arange(heads - lower, dtype=torch.float64).mul(2).add(1) / (2 * lower))
    return torch.cat((own, between)).float()


class Alibi(ExactBuffers, PositionEncoding):
    """score(i, j) + m_h (j - i): nothing learned, farther keys count less, by another slope in every head.

    Press et al. 2022 (arXiv 2108.12409), section 3.
    """

    biases = True
    relative = True
    slopes: Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.register_buffer("slopes", slopes(self.heads), persistent=False)

    def initialise(self, std: float) -> None:
        init.copy_(self.slopes, slopes(self.heads))

    def bias(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.slopes[:, None, None] * -distances(query, key)[:, None]).to(dtype)
