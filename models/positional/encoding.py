"""The small interface behind which every position encoding stands."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from models.layers import SelfInitialised


class PositionEncoding(SelfInitialised):
    """One of three roles: `adds` to the embeddings, `turns` q and k, or `biases` the scores.

    OPTIONS: the names and defaults of what `config.pe_options` may set. `relative`: a constant added to all positions
    changes nothing.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {}
    adds: ClassVar[bool] = False
    turns: ClassVar[bool] = False
    biases: ClassVar[bool] = False
    relative: ClassVar[bool] = False

    def initialise(self, std: float) -> None:
        """Parameters in submodules start as those of every other module."""

    def check_length(self, length: int) -> None:
        """Raise ValueError where `length` positions are more than the encoding can tell apart."""

    def add(
        self,
        inputs_embeds: Tensor,
        input_ids: Tensor | None,
        position_ids: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
        embedding: nn.Module,
    ) -> Tensor:
        """inputs_embeds [batch, time, hidden_size] with positions [batch or 1, time] added."""
        return inputs_embeds

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin [batch or 1, time, d_rot] in the type of `hidden_states`, None where nothing is turned."""
        return None

    def bias(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[batch or 1, heads, query, key], added to the scaled scores, for positions [batch or 1, query or key]."""
        return None


def head_size(config: PreTrainedConfig) -> int:
    """Features of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def at_distances(table: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The entries of a table [heads, n] at the distances 0 ... n - 1: [batch or 1, heads, query, key], contiguous rows.

    The future reads the entry of 0, what is farther than n - 1 the last.
    """
    found = distances(query, key).clamp(0, table.shape[1] - 1)
    return table.index_select(1, found.flatten()).unflatten(1, found.shape).transpose(0, 1)


def distances(query: Tensor, key: Tensor) -> Tensor:
    """How far each key lies behind each query: [batch or 1, query, key]; negative for the future."""
    return query[:, :, None] - key[:, None, :]
