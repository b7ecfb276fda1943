"""The quantum model: complex states in real arithmetic, so that SDPA, caches, compilers and half types run unchanged.

A complex vector z of n numbers is the real vector [Re z, Im z] of 2n. Then

- Re(q conj(k)) = Re q Re k + Im q Im k is the dot product of such vectors: ordinary scaled dot-product attention, and
  values are mixed part by part, because attention weights are real;
- position as a phase, q exp(i m theta), is the rotary embedding whose pairs are (Re q_j, Im q_j);
- a linear layer of 2n features is the widely linear map W z + V conj(z) (Picinbono & Chevalier 1995), of which the
  complex-linear ones (V = 0) are a part.

`models/quantum/reference.py` computes the same with complex numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from models.layers import (
    Decoder,
    DecoderBlock,
    DecoderForCausalLM,
    DecoderPreTrainedModel,
    ResidualProjection,
    RotaryEmbedding,
    SelfAttention,
    feed_forward,
)
from models.quantum.config import QuantumConfig


class Interference(nn.Module):
    """A wave s meets a reference r = W s + b; what comes out is their sum, weighed by how far the phases agree.

    u = (s + r) / sqrt(2), c = 2 Re(s conj r) / (|s|^2 + |r|^2) in [-1, 1], output W_o (c u). The contrast c alone, like
    every intensity, cannot tell s from -s; times u it can: without biases the layer is odd, f(-s) = -f(s).
    """

    def __init__(self, config: QuantumConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.reference = nn.Linear(config.hidden_size, config.hidden_size, bias=config.feed_forward_bias)
        self.out = ResidualProjection(config.hidden_size, config.hidden_size, bias=config.feed_forward_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden_size] -> the same."""
        reference = self.reference(hidden_states)
        s, r = (wave.unflatten(-1, (2, -1)) for wave in (hidden_states, reference))
        overlap = 2 * (s * r).sum(-2, keepdim=True)
        intensity = (s * s + r * r).sum(-2, keepdim=True)
        mixed = overlap / (intensity + self.eps) * (s + r) * 0.5**0.5
        return self.out(mixed.flatten(-2))


class FeedForwardAndInterference(nn.Module):
    """Both read the same normed state; one sum is added to the residual."""

    def __init__(self, config: QuantumConfig) -> None:
        super().__init__()
        self.feed_forward = feed_forward(config)
        self.interference = Interference(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.feed_forward(hidden_states) + self.interference(hidden_states)


class QuantumBlock(DecoderBlock):
    """The block of every decoder here, with the interference layer where the config has it."""

    def make_feed_forward(self, config: QuantumConfig, layer_idx: int) -> nn.Module:  # type: ignore[override]
        return FeedForwardAndInterference(config) if config.interference else feed_forward(config)


class QuantumPreTrainedModel(DecoderPreTrainedModel):
    """What transformers needs to know of both classes below."""

    config: QuantumConfig
    config_class = QuantumConfig
    _no_split_modules = ["QuantumBlock"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": QuantumBlock, "attentions": SelfAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Waves start as complex normal numbers: Rayleigh amplitudes, uniform phases."""
        if isinstance(module, nn.Embedding):
            real, imaginary = torch.randn(2, module.num_embeddings, module.embedding_dim // 2)
            init.copy_(module.weight, torch.cat([torch.hypot(real, imaginary), torch.atan2(imaginary, real)], dim=-1))
        else:
            super()._init_weights(module)


class QuantumModel(QuantumPreTrainedModel, Decoder):
    """The decoder without its head.

    The embedding's rows are polar, [amplitude, phase]; so are `inputs_embeds` [batch, time, hidden_size]. A token's
    wave is z = a exp(i phi) with a scaled to mean square 1 over the vector: one factor for all of its numbers, so that
    their ratios, which are what is learnt, stay.
    """

    config: QuantumConfig
    config_class = QuantumConfig

    def build(self, config: QuantumConfig) -> None:  # type: ignore[override]
        self.rotary = RotaryEmbedding(config)

    def make_block(self, config: QuantumConfig, index: int) -> nn.Module:  # type: ignore[override]
        return QuantumBlock(config, index)

    def encode(
        self,
        inputs_embeds: Tensor,
        input_ids: Tensor | None,
        position_ids: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
    ) -> Tensor:
        """Polar to cartesian: [batch, time, hidden_size] as [Re z, Im z]."""
        amplitude, phase = inputs_embeds.chunk(2, dim=-1)
        amplitude = nn.functional.rms_norm(amplitude, amplitude.shape[-1:], eps=self.config.norm_eps)
        return torch.cat([amplitude * phase.cos(), amplitude * phase.sin()], dim=-1)


class QuantumForCausalLM(QuantumPreTrainedModel, DecoderForCausalLM):
    """With a head that reads real and imaginary parts."""

    config: QuantumConfig
    config_class = QuantumConfig
    decoder_class = QuantumModel
    _tied_weights_keys = {}  # noqa: RUF012

    def __init__(self, config: QuantumConfig) -> None:
        config.validate_architecture()  # fields may have been set since the config was made
        super().__init__(config)
