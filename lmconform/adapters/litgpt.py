"""litgpt's GPT: the key/value cache lives in the model's layers and is written through `input_pos`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Past = tuple[tuple[Tensor, Tensor], ...]


def call(
    model: Any, input_ids: Tensor, past_key_values: Past | None = None, use_cache: bool | None = None
) -> Tensor | tuple[Tensor, Past]:
    """`model(idx)`, or with a cache: what it holds is put into the layers, one call made, and taken out again.

    The cache is [keys, values] a layer, each [batch, groups, time, size], as far as it is filled. litgpt takes no
    padding mask and no labels.
    """
    if past_key_values is None and not use_cache:
        logits: Tensor = model(input_ids)
        return logits
    batch, time = input_ids.shape
    start = 0 if past_key_values is None else past_key_values[0][0].shape[2]
    weight = model.lm_head.weight
    model.set_kv_cache(batch, device=input_ids.device, dtype=weight.dtype)
    layers: list[nn.Module] = [block.attn.kv_cache for block in model.transformer.h]
    try:
        for layer, past in zip(layers, past_key_values or ()):
            for kept, values in zip(layer.buffers(), past):
                kept[:, :, :start] = values
        logits = model(input_ids, input_pos=torch.arange(start, start + time, device=input_ids.device))
        cache = tuple(
            (keys[:, :, : start + time].clone(), values[:, :, : start + time].clone())
            for keys, values in (tuple(layer.buffers()) for layer in layers)
        )
    finally:
        model.clear_kv_cache()
    return logits, cache
