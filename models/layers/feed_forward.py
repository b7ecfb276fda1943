"""Position-wise feed-forward networks: [..., hidden_size] -> [..., hidden_size]."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from models.layers.config import DecoderConfig
from models.layers.initialisation import ResidualProjection


class FeedForward(nn.Module):
    """W2 act(W1 x): `hidden_act` is "gelu" (exact), "gelu_new" (GPT-2's tanh form), "relu", ..."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.feed_forward_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.down = ResidualProjection(config.intermediate_size, config.hidden_size, bias=config.feed_forward_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(self.activation(self.up(hidden_states)))


class GatedFeedForward(nn.Module):
    """W3 (act(W1 x) * W2 x), SwiGLU with "silu" (Shazeer 2020). W1 and W2 are one matrix: rows [gate; up]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.feed_forward_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.down = ResidualProjection(config.intermediate_size, config.hidden_size, bias=config.feed_forward_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


def feed_forward(config: DecoderConfig) -> nn.Module:
    """The configured feed-forward network."""
    return GatedFeedForward(config) if config.gated else FeedForward(config)
