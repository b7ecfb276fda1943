"""What a model keeps of every token beside the keys and values of its blocks."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache


def keep_beside(past_key_values: Cache, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """The new tokens' keys and values [batch, heads, time, size] behind those of all cached ones, [.., key, ..].

    They are stored through `Cache.update` as one layer more, so beams, copies, crops and static caches treat them as
    they treat any layer's; `layer` is an index beyond the model's own blocks.
    """
    layers = past_key_values.layers
    while past_key_values.layer_class_to_replicate is None and len(layers) <= layer:
        room = getattr(layers[0], "max_cache_len", None)
        layers.append(type(layers[0])() if room is None else type(layers[0])(max_cache_len=room))
    kept: tuple[Tensor, Tensor] = past_key_values.update(keys, values, layer)
    return kept
