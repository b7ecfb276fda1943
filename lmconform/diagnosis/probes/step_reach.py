"""Which keys the newest token looks at: in one forward over the text, and in a step on the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmconform.measuring.multihead import call_through
from lmconform.measuring.traces import MASKED

if TYPE_CHECKING:
    from torch import Tensor


def seen_beyond(whole: Callable[[], object], step: Callable[[], object]) -> str:
    """In words, that the step's first attention to differ looks at more keys than the forward's; "" where none does."""
    one, other = _keys_seen(whole), _keys_seen(step)
    if len(one) != len(other):
        return ""
    for number, (expected, looked_at) in enumerate(zip(one, other)):
        if expected != looked_at:
            where = f"attention {number} looks at {looked_at} keys in a step on the cache, at {expected} in one forward"
            return where if looked_at > expected else ""
    return ""


def _keys_seen(run: Callable[[], object]) -> list[int]:
    """How many keys the last query sees, call by call of softmax over [batch, heads, query, key] and of SDPA."""
    import torch
    from torch.nn import functional as F
    from torch.overrides import TorchFunctionMode

    softmaxes = {torch.softmax, torch.Tensor.softmax, F.softmax, torch.special.softmax}
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    found: list[int] = []

    def count(visible: Tensor) -> int:
        return int(visible[..., -1, :].reshape(-1, visible.shape[-1]).any(0).sum())

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = call_through(self, func, args, kwargs or {})
            with torch._C.DisableTorchFunctionSubclass():
                if func in softmaxes:
                    scores = args[0] if args else (kwargs or {})["input"]
                    if scores.dim() == 4 and result.shape == scores.shape:
                        found.append(count((result > 0) | (scores > MASKED)))
                elif func is F.scaled_dot_product_attention:
                    given = {**dict(zip(names, args)), **(kwargs or {})}
                    mask, keys = given.get("attn_mask"), given["key"].shape[-2]
                    if mask is None:
                        found.append(keys)
                    else:
                        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
                        found.append(count(seen.expand(*seen.shape[:-1], keys)))
            return result

    with Counting():
        run()
    return found
