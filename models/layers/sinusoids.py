"""Sinusoidal position vectors in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoids(positions: Tensor, size: int, base: float = 10_000.0) -> Tensor:
    """PE(p, 2i) = sin(p / base^(2i / size)), PE(p, 2i + 1) = cos(same) (Vaswani et al. 2017, section 3.5).

    positions [...] of any number type -> [..., size] in float32; an odd `size` ends with a sine.
    """
    rates = base ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    angles = positions[..., None].float() * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :size]
