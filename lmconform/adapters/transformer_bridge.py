"""TransformerLens from 4 on: TransformerBridge around a model of transformers or its own; `return_type` says what
comes out."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def call(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    labels: Tensor | None = None,
) -> dict[str, Any]:
    """`model(tokens, return_type=...)`: "both" with labels, which it shifts itself, "logits_and_cache" with a cache."""
    given = {"attention_mask": attention_mask, "past_key_values": past_key_values, "labels": labels}
    inputs = {name: value for name, value in given.items() if value is not None}
    if labels is not None:
        logits, loss = model(input_ids, return_type="both", **inputs)
        return {"logits": logits, "loss": loss}
    if past_key_values is not None or use_cache:
        logits, cache = model(input_ids, return_type="logits_and_cache", use_cache=True, **inputs)
        return {"logits": logits, "past_key_values": cache}
    return {"logits": model(input_ids, return_type="logits", **inputs)}
