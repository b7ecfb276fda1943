"""TransformerLens before 4: HookedTransformer, whose cache has to be made beforehand and is written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def call(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
) -> Tensor | tuple[Tensor, Any]:
    """`model(tokens)`; the cache remembers the mask of earlier tokens, so that only the new ones' is handed over."""
    cache = past_key_values
    if cache is None and use_cache:
        cache = _cache_class().init_cache(model.cfg, input_ids.device, input_ids.shape[0])
    if cache is not None:  # without a tokenizer it asks for one
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        attention_mask = attention_mask[:, -input_ids.shape[1] :]
    logits = model(input_ids, return_type="logits", attention_mask=attention_mask, past_kv_cache=cache)
    return logits if cache is None else (logits, cache)


def _cache_class() -> Any:
    import transformer_lens

    named = ("TransformerLensKeyValueCache", "HookedTransformerKeyValueCache")
    return next(getattr(transformer_lens, name) for name in named if hasattr(transformer_lens, name))
