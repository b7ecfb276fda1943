"""Normalisation over the last dimension."""

from __future__ import annotations

from torch import nn

from models.layers.config import DecoderConfig


def norm(config: DecoderConfig) -> nn.Module:
    """The configured norm over [..., hidden_size]: LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019)."""
    if config.norm == "rms":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
