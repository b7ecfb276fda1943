"""x-transformers' TransformerWrapper: the cache comes with `return_intermediates`, masks are bool."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def call(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
) -> Tensor | dict[str, Any]:
    """`model(x)`; on a cache only the new tokens are handed over, with `input_not_include_cache` and `cache_age`."""
    given = {"mask": None if attention_mask is None else attention_mask.bool(), "pos": position_ids}
    inputs: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if past_key_values is None and not use_cache:
        plain: Tensor = model(input_ids, **inputs)
        return plain
    if past_key_values is not None:
        if model.attn_layers.rotary_pos_emb is not None:
            # pos would have to count past tokens too; the rotation is relative, and counts them by itself
            inputs.pop("pos", None)
        inputs.update(cache=past_key_values, input_not_include_cache=True, cache_age=input_ids.shape[1])
    logits, cache = model(input_ids, return_intermediates=True, **inputs)
    return {"logits": logits, "past_key_values": cache}
