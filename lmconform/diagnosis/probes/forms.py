"""A recurrence has two forms: over many tokens at once, and token by token. Do they compute the same?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.measuring.attending import may_attend

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

PIECE = 5  # tokens: less than any chunk that a scan works in


def forms_differ(subject: Specimen, ids: Tensor) -> str:
    """In words, how one call over all of `ids` [1, time] differs from calls over pieces; "" where it is not at fault.

    Pieces and single tokens must agree, in a model without attention. Which of the two sides errs shows when the first
    piece is fed beforehand: an error inside a call then comes that much later, one of the cache at the same place.
    """
    if may_attend(subject):
        return ""
    whole = subject.logits(ids)
    bound = tolerance.allowed(subject.noise, whole)
    by_piece, by_token = (_fed(subject, ids, [size] * -(-ids.shape[1] // size)) for size in (PIECE, 1))
    if _first_off(by_piece, by_token, bound) is not None:
        return ""
    first = _first_off(whole, by_token, bound)
    later = _first_off(_fed(subject, ids, [PIECE, ids.shape[1]]), by_token, bound)
    if first is None or (later is not None and later < first + PIECE):
        return ""
    return (
        f"fed token by token and in pieces of {PIECE} it says the same; one call over {ids.shape[1]} tokens differs "
        f"from its token {first} on" + ("" if later is None else ", wherever in the text that call begins")
    )


def _fed(subject: Specimen, ids: Tensor, sizes: list[int]) -> Tensor:
    import torch

    parts, cache = [], None
    for piece in ids.split(_fitting(sizes, ids.shape[1]), dim=1):
        output = subject.forward(piece, cache=cache, use_cache=True)
        parts.append(output.logits)
        cache = output.cache
    return torch.cat(parts, dim=1)


def _fitting(sizes: list[int], time: int) -> list[int]:
    """The same sizes, the last one cut so that they sum up to `time`."""
    fitting: list[int] = []
    for size in sizes:
        fitting.append(min(size, time - sum(fitting)))
    return [size for size in fitting if size]


def _first_off(one: Tensor, other: Tensor, bound: float) -> int | None:
    off = (one - other).abs().amax((0, 2)).gt(bound).nonzero().flatten()
    return int(off[0]) if len(off) else None
