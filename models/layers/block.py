"""Decoder block: attention and feed-forward, each in a residual branch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from models.layers.attention import SelfAttention
from models.layers.config import DecoderConfig
from models.layers.feed_forward import feed_forward
from models.layers.norms import norm


class DecoderBlock(GradientCheckpointingLayer):
    """Pre-norm: x + attention(norm(x)), then x + feed_forward(norm(x)); both from one x with parallel residual.

    Post-norm (Vaswani et al. 2017): norm(x + attention(x)), then norm(x + feed_forward(x)).
    """

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        if config.use_parallel_residual and config.norm_placement == "post":  # set after the config was validated
            raise ValueError("use_parallel_residual is defined for pre-norm blocks: set norm_placement to 'pre'")
        self.post = config.norm_placement == "post"
        self.parallel = config.use_parallel_residual
        self.attention_norm = norm(config)
        self.attention = self.make_attention(config, layer_idx)
        self.feed_forward_norm = norm(config)
        self.feed_forward = self.make_feed_forward(config, layer_idx)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def make_attention(self, config: DecoderConfig, layer_idx: int) -> nn.Module:
        return SelfAttention(config, layer_idx)

    def make_feed_forward(self, config: DecoderConfig, layer_idx: int) -> nn.Module:
        return feed_forward(config)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        """hidden_states [batch, time, hidden_size] -> the same; mask (`Scores.mask`) and keywords go to the attention.

        A mask that carries a learned bias is given by place: reentrant gradient checkpointing follows no keyword.
        """
        kwargs["attention_mask"] = attention_mask
        if self.post:
            attended, _ = self.attention(hidden_states, **kwargs)
            hidden_states = self.attention_norm(hidden_states + self.dropout(attended))
            return self.feed_forward_norm(hidden_states + self.dropout(self.feed_forward(hidden_states)))
        attended, _ = self.attention(self.attention_norm(hidden_states), **kwargs)
        attended = hidden_states + self.dropout(attended)
        source = hidden_states if self.parallel else attended
        return attended + self.dropout(self.feed_forward(self.feed_forward_norm(source)))
