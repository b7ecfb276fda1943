"""One mask for all layers: causal, padding and score bias folded into what the attention function adds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_causal_mask

from models.layers.positions import key_positions


class Scores(NamedTuple):
    """What is done to the scores q k^T / sqrt(d) of every layer before the softmax.

    mask: as the attention function takes it: None (plain causal), boolean or additive [batch, 1 or heads, query, key],
    or flex attention's BlockMask. bias: [batch or 1, heads, query, key], only where it cannot be folded into the mask.
    """

    mask: Any
    bias: Tensor | None = None


def causal_mask(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Any,
    past_key_values: Cache | None,
    position_ids: Tensor | None,
) -> Any:
    """transformers' mask for this attention function: None where a plain causal mask needs no tensor.

    attention_mask: [batch, past + time] of 1 and 0, a ready 4-D mask (passed through), or None.
    """
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )


def seen_positions(mask: Any, attention_mask: Any, position_ids: Tensor, past_key_values: Cache | None) -> Tensor:
    """Positions of the keys that the layers will see, for queries at position_ids [batch or 1, time]: [.., key].

    mask: what `causal_mask` gave; None says that no key is padding. A static cache has more keys than were seen so far.
    """
    time = position_ids.shape[1]
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    if mask is None:
        length = time if past_key_values is None else int(past_key_values.get_mask_sizes(time, 0)[0])
        return key_positions(position_ids, None, length, past)
    return key_positions(position_ids, real_keys(attention_mask), mask.shape[-1], past)


def real_keys(attention_mask: Any) -> Tensor | None:
    """Which keys are real tokens [batch, key], from a padding mask or from what a 4-D mask lets the last query see."""
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.ndim == 2:
        return attention_mask
    seen = attention_mask[:, 0, -1]
    return seen if seen.dtype == torch.bool else seen == 0


def score_mask(config: PreTrainedConfig, mask: Any, bias: Tensor | None, past: int | Tensor) -> Scores:
    """Fold `bias` [batch or 1, heads, query, key] into the mask, once for all layers.

    mask: what `causal_mask` gave. Masked entries get half of the type's lowest value: adding a score to it cannot
    overflow to -inf in half types, and its exponential is exactly 0.
    """
    if bias is None:
        return Scores(mask)
    if mask is not None and not isinstance(mask, Tensor):
        # flex attention indexes every row and head
        return Scores(mask, bias.expand(mask.shape[0], config.num_attention_heads, -1, -1))
    if mask is None:
        query, key = bias.shape[-2:]
        if not getattr(config, "is_causal", True) or (query == 1 and isinstance(past, int) and key == past + 1):
            return Scores(bias)  # nothing lies ahead
        rows = torch.arange(query, device=bias.device) + past
        mask = (torch.arange(key, device=bias.device) <= rows[:, None])[None, None]
    elif mask.dtype != torch.bool:
        mask = mask == 0
    return Scores(torch.where(mask, bias, torch.finfo(bias.dtype).min / 2))
