"""Counts over everything seen so far, kept in the key-value cache as one more layer."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from models.layers import keep_beside


def with_prefix(values: Tensor, past_key_values: Cache | None, layer: int, dtype: torch.dtype) -> Tensor:
    """Integers [batch, time, n] of the new tokens behind those of all cached ones: [batch, key, n], n at least 2.

    `layer` is the index of the first layer beyond the model's own, see `keep_beside`.
    """
    if past_key_values is None:
        return values
    stored = values[:, None].to(dtype)
    keys, rest = keep_beside(past_key_values, stored[..., :1], stored[..., 1:], layer)
    return torch.cat((keys, rest), dim=-1)[:, 0].long()
