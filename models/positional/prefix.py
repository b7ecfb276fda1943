"""Counts over everything seen so far, kept in the key-value cache as one more layer."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache


def with_prefix(values: Tensor, past_key_values: Cache | None, layer: int, dtype: torch.dtype) -> Tensor:
    """Integers [batch, time, n] of the new tokens behind those of all cached ones: [batch, key, n], n at least 2.

    They are stored through `Cache.update` like any layer's keys and values, so beams, copies, crops and static caches
    treat them as they treat those; `layer` is the index of the first layer beyond the model's own.
    """
    if past_key_values is None:
        return values
    layers = past_key_values.layers
    while past_key_values.layer_class_to_replicate is None and len(layers) <= layer:
        room = getattr(layers[0], "max_cache_len", None)
        layers.append(type(layers[0])() if room is None else type(layers[0])(max_cache_len=room))
    stored = values[:, None].to(dtype)
    keys, rest = past_key_values.update(stored[..., :1], stored[..., 1:], layer)
    return torch.cat((keys, rest), dim=-1)[:, 0].long()
