"""Sinusoidal position vectors in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoids(positions: Tensor, size: int, base: float = 10_000.0) -> Tensor:
    """PE(p, 2i) = sin(p / base^(2i / size)), PE(p, 2i + 1) = cos(same) (Vaswani et al. 2017, section 3.5).

    positions [...] of any number type -> [..., size] in float32; an odd `size` ends with a sine.
    """
    return waves(positions[..., None].float() * rates(size, base, positions.device), size)


def rates(size: int, base: float, device: torch.device | str | None = None) -> Tensor:
    """base^(-2i / size): [ceil(size / 2)] in float32."""
    return base ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)


def waves(angles: Tensor, size: int) -> Tensor:
    """Sines and cosines of the angles [..., ceil(size / 2)] in turn: [..., size]."""
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :size]
