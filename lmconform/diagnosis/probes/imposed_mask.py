"""A causal mask laid over every attention of a model from outside, whatever mask it has itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform.measuring.multihead import call_through

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def future_weights() -> Iterator[list[tuple[float, float]]]:
    """Within it, what each softmax over [..., query, key] gives to later keys.

    Pairs: the share of later keys that get any weight, and their mean weight over that of the keys before.
    """
    import torch
    from torch.nn import functional as F
    from torch.overrides import TorchFunctionMode

    softmaxes = {torch.softmax, torch.Tensor.softmax, F.softmax, torch.special.softmax}
    noted: list[tuple[float, float]] = []

    class Noting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = call_through(self, func, args, kwargs or {})
            if func in softmaxes and made.dim() in (3, 4) and 1 < made.shape[-2] == made.shape[-1]:
                hidden = torch.ones(made.shape[-2:], dtype=torch.bool, device=made.device).triu(1)
                later, earlier = made[..., hidden], made[..., ~hidden]
                noted.append((float((later > 0).float().mean()), float(later.mean() / earlier.mean())))
            return made

    with Noting():
        yield noted


@dataclass
class Seen:
    """How many attentions were met."""

    count: int = 0


@contextmanager
def imposed_causal_mask() -> Iterator[Seen]:
    """Within it, softmax over [..., query, key] and scaled_dot_product_attention look at no later key."""
    import torch
    from torch.nn import functional as F
    from torch.overrides import TorchFunctionMode

    seen = Seen()
    softmaxes = {torch.softmax, torch.Tensor.softmax, F.softmax, torch.special.softmax}
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

    def later(query: int, key: int, like: Tensor) -> Tensor:
        return torch.ones(query, key, dtype=torch.bool, device=like.device).triu(key - query + 1)

    class Masking(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func in softmaxes and args and isinstance(args[0], torch.Tensor):
                scores = args[0]
                axis = args[1] if len(args) > 1 else kwargs.get("dim")
                if (
                    scores.dim() in (3, 4)
                    and axis in (-1, scores.dim() - 1)
                    and 1 < scores.shape[-2] <= scores.shape[-1]
                ):
                    seen.count += 1
                    hidden = later(scores.shape[-2], scores.shape[-1], scores)
                    args = (scores.masked_fill(hidden, torch.finfo(scores.dtype).min), *args[1:])
            elif func is F.scaled_dot_product_attention:
                given = {**dict(zip(names, args)), **kwargs}
                query, key, mask = given["query"], given["key"], given.get("attn_mask")
                seen.count += 1
                hidden = later(query.shape[-2], key.shape[-2], query)
                bias = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)
                if mask is not None and mask.dtype == torch.bool:
                    bias = bias.masked_fill(~mask, torch.finfo(query.dtype).min)
                elif mask is not None:
                    bias = (bias + mask).clamp(min=torch.finfo(query.dtype).min)
                given.update(attn_mask=bias, is_causal=False)
                args, kwargs = (), given
            return call_through(self, func, args, kwargs)

    with Masking():
        yield seen
