"""positions: every earlier token can influence a later logit, and a window cuts where it is stated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmconform import structure
from lmconform.checks.block_influence import damped_influence, influence_of
from lmconform.checks.block_kinds import stated_window
from lmconform.checks.first_block import blocks
from lmconform.checks.positions import LONGEST, stack_of
from lmconform.context import Hint
from lmconform.measuring.attending import may_attend
from lmconform.measuring.dropout import without_dropout
from lmconform.measuring.fading import fades
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen


@register_check(
    "positions.reach",
    holds="every earlier token can influence the last logit; a stated window cuts exactly where it says",
    requires=COMPARES_LOGITS,
)
def check_reach(subject: Specimen, ctx: Context) -> None:
    """Each block alone: the gradient of every logit with respect to each earlier input of the block, zero or not.

    A window of w tokens means, as in transformers, the token itself and w - 1 before it. An influence that fades with
    distance, as that of a recurrence with decay, until the type has no number so small, is no cut. A block without
    attention may reach the same few tokens from everywhere, as a convolution does, where other blocks reach them all.
    In train mode, dropout off, a stated window must cut as well.
    """
    stack = stack_of(subject, ctx)
    context = subject.longest(LONGEST)
    whole = False
    windows: dict[int, int] = {}
    kernels: list[tuple[int, int, Tensor]] = []
    tokenwise = _tokenwise(subject, ctx, stack)
    if tokenwise:
        ctx.note(f"blocks {', '.join(map(str, tokenwise))} mix no tokens: they are the feed-forward parts of layers")
    for index in range(min(len(stack), 8)):
        if index in tokenwise:
            continue
        stated = stated_window(subject, index, len(stack))
        if isinstance(stated, int) and any(_convolves(part) for part in stack[index].modules()):
            stated = "reaches past its window by a convolution"
        if isinstance(stated, str):
            ctx.note(f"block {index} {stated}")
            continue
        if stated is not None:
            windows[index] = stated
        short = subject.longest(40 if stated is None else min(stated + 8, LONGEST))
        influence = influence_of(subject, ctx, stack, index, ctx.ids(1, short), range(short))
        if influence is None:
            ctx.note(f"block {index}: its input could not be told")
            continue
        kernel = _kernel(influence) if stated is None else None
        if kernel and not may_attend(subject, structure.called(stack[index]), within_a_window=True):
            ctx.note(f"block {index} has no attention and reaches {kernel} tokens from everywhere")
            kernels.append((index, short, influence))
            continue
        whole = True
        _check_reach_of(subject, ctx, stack, index, stated, range(short), short, influence)
        if context > short:
            far = influence_of(subject, ctx, stack, index, ctx.ids(1, context), [context - 1])
            if far is not None:
                _check_reach_of(subject, ctx, stack, index, stated, [context - 1], context, far)
    if windows:
        _cut_in_training_too(subject, ctx, windows)
    if whole:
        return
    for index, short, influence in kernels:
        _check_reach_of(subject, ctx, stack, index, None, range(short), short, influence)
    ctx.not_applicable("; ".join(ctx.notes))


def _cut_in_training_too(subject: Specimen, ctx: Context, windows: dict[int, int]) -> None:
    """Train mode often takes another attention kernel, which wants the window said again. `windows`: by block."""
    import torch

    quiet = without_dropout(subject, lent=True)
    stack = blocks(quiet)
    if isinstance(stack, str):
        return
    for index, window in windows.items():
        time = subject.longest(min(window + 8, LONGEST))
        if time <= window:
            continue
        ids, queries = ctx.ids(1, time), range(window, time)
        influence = influence_of(quiet, ctx, stack, index, ids, queries, train=True)
        if influence is None:
            continue
        felt = influence.abs().amax(-1) > 0
        beyond = torch.arange(time)[None] <= torch.tensor(list(queries))[:, None] - window
        if bool((felt & beyond).any()):
            row, place = (felt & beyond).nonzero()[0].tolist()
            at = queries[row]
            ctx.fail(
                f"in train mode the window of {window} tokens that the config states is not what is cut: position {at} "
                f"feels token {place}, {at - place + 1} tokens back counting itself",
                where=f"block {index}, position {at} and token {place}, train mode",
                hint=Hint(
                    "the branch for training leaves the window's mask out: is_causal alone, or a kernel that is not "
                    "told of the window",
                    "mask.window",
                    "mask.train_only",
                ),
            )


def _kernel(influence: Tensor) -> int | None:
    """How many tokens, itself included, every position feels; None where they differ. [query, position, width]"""
    import torch

    felt = influence.abs().amax(-1) > 0
    kernel, time = int(felt[-1].sum()), len(felt)
    band = torch.ones(time, time, dtype=torch.bool).tril().triu(1 - kernel)
    return kernel if 1 < kernel < time and torch.equal(felt, band) else None


def _tokenwise(subject: Specimen, ctx: Context, stack: list[nn.Module]) -> list[int]:
    """Blocks that are half a layer, the half without attention: lists (`structure.called`) of one make beside others,
    none of which lets a token feel another, while those of another make do."""
    makes = [tuple(type(part) for part in structure.called(block)) for block in stack[:8]]
    if len(set(makes)) == 1 or any(make == (type(block),) for make, block in zip(makes, stack)):
        return []
    ids = ctx.ids(1, subject.longest(6))
    queries = list(range(ids.shape[1]))
    mixes: set[tuple[type, ...]] = set()
    for index, make in enumerate(makes):
        influence = influence_of(subject, ctx, stack, index, ids, queries) if make not in mixes else None
        if influence is not None and bool((influence.abs().amax(-1).tril(-1) > 0).any()):
            mixes.add(make)
    return [index for index, make in enumerate(makes) if make not in mixes] if mixes else []


def _check_reach_of(
    subject: Specimen, ctx: Context, stack: list[nn.Module], index: int, window: int | None, queries: Sequence[int],
    time: int, influence: Tensor,
) -> None:  # fmt: skip
    """`influence` [query, position, width] of block `index`, on `time` tokens, against what it is to reach."""
    import torch

    ids = ctx.ids(1, time)
    felt = influence.abs().amax(-1) > 0  # [query, position]
    query, position = torch.tensor(list(queries))[:, None], torch.arange(time)[None]
    past = position <= query
    inside = past if window is None else past & (position > query - window)
    both: tuple[Tensor, ...] = (influence,)
    if bool((inside & ~felt).any()):
        damped = damped_influence(subject, ctx, index, ids, queries)
        if damped is not None:
            felt = felt | (inside & (damped.abs().amax(-1) > 0))
            both = (damped, influence)
    if bool((inside & ~felt).any()) and _fades(subject, ctx, index, ids, queries, inside, both):
        numbers = str(subject.dtype).removeprefix("torch.")
        ctx.note(f"block {index}: an influence fades from token to token, until {numbers} has no number so small")
        felt = felt | inside
    for wrong, what in ((inside & ~felt, "cut"), (past & ~inside & felt, "open")):
        if not bool(wrong.any()):
            continue
        row, place = wrong.nonzero()[0].tolist()
        at = queries[row]
        seen = felt[row, : at + 1].nonzero().flatten().tolist()
        reach = at - min(seen) + 1 if seen else 0
        where = f"block {index}, position {at} and token {place}"
        if window is None:
            ctx.fail(
                f"a token cannot influence a later logit: position {at} feels {len(seen)} of the {at + 1} tokens up to "
                f"it, and not token {place}",
                where=where,
                hint=Hint(
                    "attention is cut short: a local mask, a truncated cache or a bucketed bias that ends, or a mask "
                    "that leaves out whole tokens; a window that is meant has to be stated, config.sliding_window",
                    "mask.window",
                )
                if may_attend(subject, structure.called(stack[index]))
                else "the block has no attention: a state that is cleared, overwritten or detached on the way, or a "
                "convolution or a sum that ends",
            )
        ctx.fail(
            f"the window of {window} tokens that the config states is not what is cut: position {at} feels token "
            f"{min(seen, default=at)}, {reach} tokens back counting itself"
            if what == "open"
            else f"the window of {window} tokens that the config states is cut short: position {at} does not feel "
            f"token {place}, {at - place + 1} tokens back counting itself",
            where=where,
            hint=Hint(
                "an off-by-one in the window (key > query - window keeps the token itself and window - 1 before it), "
                "or the layer ignores the window",
                "mask.window",
            ),
        )


def _fades(
    subject: Specimen, ctx: Context, index: int, ids: Tensor, queries: Sequence[int], inside: Tensor,
    influences: Sequence[Tensor],
) -> bool:  # fmt: skip
    """Whether the tokens `inside` [query, position] that are not felt are those whose influence has faded to nothing.

    `influences` [query, position, width], with small weights first, are judged by the numbers of the subject's type.
    Where there is a float64 copy it must fade there as well: it goes on falling long after float32 has no more numbers.
    Without one only what small weights say counts: attention that looks at one token alone falls steeply, too.
    """
    import torch

    wide = subject.twin()
    stack = None if wide is None else blocks(wide)
    told = influences if wide is not None else influences[:1]
    if not any(fades(each.abs().amax(-1), queries, inside, subject.dtype) for each in told):
        return False
    if wide is None or stack is None or isinstance(stack, str):
        return True
    finer = damped_influence(wide, ctx, index, ids, queries)
    finer = influence_of(wide, ctx, stack, index, ids, queries) if finer is None else finer
    return finer is not None and fades(finer.abs().amax(-1), queries, inside, torch.float64)


def _convolves(part: nn.Module) -> bool:
    name = type(part).__name__
    return "conv" in name.lower() and name != "Conv1D"  # transformers' Conv1D is a linear layer
