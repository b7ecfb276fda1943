"""Whether what a token does to later logits fades away by itself, or is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STEPS = 4.0  # tokens further at the mean rate of fall: where decays depend on the data, they differ from token to token
FELT = 3  # earlier tokens that a position must feel for a rate of fall to be told
UNDERFLOW = 0.9  # of a type's exponents: a product may fall below its smallest number before a last factor lifts it


def fades(influence: Tensor, queries: Sequence[int], wanted: Tensor, dtype: torch.dtype) -> bool:
    """Whether each token of `wanted` [query, position] with an influence of 0 lies where the type has no number left.

    `influence` [query, position] is the size of each position's gradient, computed in `dtype`, for the logits at
    `queries`. A recurrence with a decay, or attention with a bias that falls with distance, takes it down by a factor
    a token: where the last tokens that are felt are on the way to the smallest number of the type, at the mean rate
    from the token before the query on, the next ones are there. A window ends far above. The query itself does not
    count: the residual stream takes it past the mixer.
    """
    import torch

    smallest = UNDERFLOW * torch.tensor(torch.finfo(dtype).tiny, dtype=torch.float64).log()
    for row, query, expected in zip(influence.double(), queries, wanted, strict=True):
        unfelt = (expected & (row == 0)).nonzero()
        if not len(unfelt):
            continue
        falling = row[int(unfelt.max()) + 1 : query].log()
        if len(falling) < FELT:
            return False
        rate = (falling[-1] - falling[0]) / (len(falling) - 1)
        if not bool(falling[0] - STEPS * rate < smallest):
            return False
    return True
