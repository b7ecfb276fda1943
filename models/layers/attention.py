"""Multi-head causal self-attention through transformers' attention functions (eager, SDPA, flex, ...)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.layers.config import DecoderConfig
from models.layers.initialisation import ResidualProjection
from models.layers.rotary import turn


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scaling + mask) v with explicit weights; q [batch, heads, query, head_dim], k and v may have fewer.

    Gives [batch, query, heads, head_dim] and the weights [batch, heads, query, key].
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores + attention_mask
    exact = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = scores.softmax(dim=-1, dtype=exact).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    implementation: str,
    scaling: float,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The configured attention function on [batch, heads, time, head_dim]; gives [batch, time, heads, head_dim].

    Where a learned bias wants its gradient SDPA has no fused kernel on the CPU, and what it does instead takes more
    passes than attention written out.
    """
    learned = implementation == "sdpa" and isinstance(attention_mask, Tensor) and attention_mask.requires_grad
    if learned and query.device.type == "cpu":
        rate = dropout if module.training else 0.0
        return eager_attention(module, query, key, value, attention_mask, scaling, rate)[0], None
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    return function(
        module, query, key, value, attention_mask,
        scaling=scaling, dropout=dropout if module.training else 0.0, **kwargs,
    )  # fmt: skip


class SelfAttention(nn.Module):
    """One fused projection to q, k, v (rows: all heads of q, of k, of v), attention, output projection."""

    is_causal = True

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.heads // self.kv_heads
        self.scaling = self.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, rows, bias=config.attention_bias)
        self.out = ResidualProjection(self.heads * self.head_dim, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [batch, time, hidden_size] -> the same, and the attention weights where the function has them.

        attention_mask: `Scores.mask`. position_embeddings: cos and sin [batch, time, d_rot] that turn q and k.
        """
        batch, time, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, time, -1, self.head_dim).transpose(1, 2)
        qk, value = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if position_embeddings is not None:
            qk = turn(qk, *position_embeddings)
        query, key = qk.split((self.heads, self.kv_heads), dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mixed, weights = attend(
            self, query, key, value, attention_mask,
            implementation=self.config._attn_implementation or "eager", scaling=self.scaling,
            dropout=self.config.attention_dropout, **kwargs,
        )  # fmt: skip
        return self.out(mixed.reshape(batch, time, -1)), weights
