"""What the inputs of one block, alone, do to later logits: the gradient, zero or not. Nothing is registered here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmconform.checks.first_block import alone, blocks
from lmconform.context import Unavailable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

DAMPED = 0.1


def influence_of(
    subject: Specimen,
    ctx: Context,
    stack: list[nn.Module],
    index: int,
    ids: Tensor,
    queries: Sequence[int],
    *,
    train: bool = False,
) -> Tensor | None:
    """d (a random mix of the logits at each query) / d (block `index`'s input), that block alone: [query, time, width].

    One row a query, so that one backward pass gives them all. None where the block's input cannot be told.
    """
    import torch

    rows, time = torch.arange(len(queries)), ids.shape[1]
    asked = len(queries) + (len(queries) == time)  # unlike time, so that [batch, time] and [time, batch] can be told
    with alone(stack, index) as inputs:
        logits = subject.logits(ids.expand(asked, -1).contiguous(), grad=True, train=train)
    if len(inputs) != 1 or inputs[0].shape[:2] not in ((asked, time), (time, asked)):
        return None
    mix = torch.randn(logits.shape[-1], generator=ctx.generator(index)).to(logits)
    total = (logits[rows, list(queries)] @ mix).sum()
    if not total.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(total, inputs, allow_unused=True)
    if gradient is None:
        return None
    with torch._C.DisableTorchFunctionSubclass():  # a subclass may know nothing of what is done with it from here on
        if gradient.shape[0] == time:  # blocks that take the sequence first
            gradient = gradient.transpose(0, 1)
        return gradient[: len(queries)].detach().flatten(2).double().cpu()


def damped_copy(subject: Specimen) -> tuple[Specimen, list[nn.Module]] | None:
    """A copy with small weights, and its blocks: scores near 0, so that no softmax gives a token exactly nothing.

    What a mask hides stays hidden. None where there is no room for a copy.
    """
    try:
        copied = subject.scaled(DAMPED)
        stack = blocks(copied)
    except Unavailable:
        return None
    return None if isinstance(stack, str) else (copied, stack)


def damped_influence(subject: Specimen, ctx: Context, index: int, ids: Tensor, queries: Sequence[int]) -> Tensor | None:
    damped = damped_copy(subject)
    return None if damped is None else influence_of(damped[0], ctx, damped[1], index, ids, queries)
