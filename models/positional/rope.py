"""Rotary position embedding."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedConfig

from models.layers import RotaryEmbedding
from models.positional.encoding import PositionEncoding


class Rope(PositionEncoding):
    """RoFormer (Su et al. 2021, arXiv 2104.09864), equations 14 and 15: q_i and k_j are turned by i theta and j theta.

    theta_i = base^(-2i / d_rot), so q_i . k_j depends on i - j alone. `config.rope_parameters`, in transformers' own
    format, gives the base (rope_theta), the share of each head that is turned (partial_rotary_factor) and the scaling.
    """

    turns = True
    relative = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.tables = RotaryEmbedding(config)

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.tables(hidden_states, position_ids)
