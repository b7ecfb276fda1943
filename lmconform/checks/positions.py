"""positions: order is seen, every position is reached and told apart, and shifting means what it should."""

from __future__ import annotations

from typing import TYPE_CHECKING, Never

from lmconform import structure, tolerance
from lmconform.cases import Span
from lmconform.checks.block_influence import damped_copy, damped_influence, influence_of
from lmconform.checks.block_kinds import one_of_each_kind, stated_window
from lmconform.checks.first_block import alone, blocks, constant_inputs
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

LONGEST = 128  # positions looked at where the context is longer
MOST = 0.9  # of all pairs of positions: what is left is rounding
TABLE = 2048  # rows of an absolute encoding looked at
QUERY_STEP = 8


def stack_of(subject: Specimen, ctx: Context) -> list[nn.Module]:
    stack = blocks(subject)
    if isinstance(stack, str):
        leave(ctx, stack)
    return stack


def leave(ctx: Context, reason: str) -> Never:
    ctx.not_applicable(reason)
    raise AssertionError("not_applicable() leaves the check")


@register_check(
    "positions.order_matters",
    holds="swapping two earlier tokens changes later logits with the first block alone",
    profile="smoke",
    requires=COMPARES_LOGITS,
    space={"time": Span(6, 40)},
    grid=({"time": 16},),
)
def check_order_matters(subject: Specimen, ctx: Context) -> None:
    """Every pair of neighbours swapped, one a row; all blocks but the first hand their input on.

    The first block alone: without positions it sees a set of earlier tokens, while a deeper causal stack finds the
    order by itself (Haviv et al. 2022, "Transformer Language Models without Positional Encodings Still Learn
    Positional Information").
    """
    stack = stack_of(subject, ctx)
    kinds = one_of_each_kind(subject.config, stack)
    for case in ctx.cases():
        time = subject.longest(case.time)
        base = _unlike_neighbours(subject, ctx, time)
        for index in kinds:
            change, floor, spread = _effect_of_swaps(subject, base, index)
            blind = (change <= floor).nonzero().flatten().tolist()
            wide = subject.twin() if blind else None
            if blind and wide is None and tolerance.is_half(subject.dtype):
                blind = [pair for pair in blind if not change[pair]]
            if blind and wide is not None and not isinstance(blocks(wide), str):
                # attention that looks at one token alone leaves float32 no digits for the others; float64 has them
                finer, finer_floor, _ = _effect_of_swaps(wide, base, index)
                blind = [pair for pair in blind if finer[pair] <= finer_floor]
                if blind and (damped := damped_copy(wide)) is not None:
                    finer, finer_floor, _ = _effect_of_swaps(damped[0], base, index)
                    blind = [pair for pair in blind if finer[pair] <= finer_floor]
            everywhere = len(blind) == time - 2
            if not blind:
                break
            if floor > spread:
                ctx.not_applicable(f"rounding alone changes logits by up to {floor:.3g}: no change can be told from it")
            if everywhere and index != kinds[-1]:
                ctx.note(f"block {index} sees no order; the config states other kinds of block, which may")
                continue
            name = "the first block" if index == 0 or everywhere else f"block {index}"
            ctx.fail(
                f"{name} alone does not see the order of earlier tokens: swapping tokens "
                f"{blind[0]} and {blind[0] + 1} changed no later logit"
                + ("" if everywhere else f" ({len(blind)} of {time - 2} pairs of neighbours)")
                + f" (by {float(change[blind[0]]):.3g}; rounding alone by up to {floor:.3g})",
                where=f"block {kinds[0] if everywhere else index}, positions {blind[0]} and {blind[0] + 1}",
                hint=Hint(
                    "no position encoding reaches attention: it is never applied, or applied to the wrong tensor, or "
                    "all positions are the same number",
                    "position.absent",
                    "position.no_op",
                )
                if everywhere
                else Hint(
                    "neighbouring positions share one encoding: look at how position ids are made (integer division, "
                    "rounding, a clamp)",
                    "position.collision",
                ),
            )


def _effect_of_swaps(subject: Specimen, base: Tensor, index: int) -> tuple[Tensor, float, float]:
    """By how much each swap of neighbours in base [1, time] moves a later logit, with block `index` alone: [time - 2].

    Beside it what rounding alone may do, and the logits' standard deviation.
    """
    import torch

    time = base.shape[1]
    swapped = base.repeat(time - 2, 1)
    first = torch.arange(time - 2)
    swapped[first, first], swapped[first, first + 1] = base[0, 1:-1], base[0, :-2]
    later = torch.arange(time)[None] > first[:, None] + 1
    stack = blocks(subject)
    assert not isinstance(stack, str)
    with alone(stack, index):
        logits = subject.logits(torch.cat([base, swapped]))
    change = (logits[1:].double() - logits[:1].double()).abs().amax(-1).cpu().masked_fill(~later, 0).amax(-1)
    return change, tolerance.allowed(subject.noise, logits), float(logits.double().std())


def _unlike_neighbours(subject: Specimen, ctx: Context, time: int) -> Tensor:
    """Ordinary tokens [1, time], each unlike the one before."""
    import torch

    ordinary = subject.ordinary_ids
    steps = torch.randint(1, len(ordinary), (1, time), generator=ctx.generator(time))
    return torch.tensor(ordinary)[steps.cumsum(-1) % len(ordinary)].to(subject.device)


@register_check(
    "positions.distinct",
    holds="no two positions in the stated context are treated alike, to the end of it",
    requires=COMPARES_LOGITS,
)
def check_distinct(subject: Specimen, ctx: Context) -> None:
    """One token over and over: whatever differs between two places is the position encoding.

    Absolute encodings show in what the first block receives. Otherwise the first block alone is asked how much each
    place weighs (the gradient with respect to it) for queries all over the context.
    """
    import torch

    stack = stack_of(subject, ctx)
    length = subject.longest(TABLE)
    received = constant_inputs(subject, subject.longest(LONGEST))
    if received is None:
        leave(ctx, "what the first block receives cannot be told")
    if _spread(received) > 1e-5:
        if length > received.shape[0]:
            received, length = _taken(subject, ctx, received, length)
        alike = _alike(received[None].double(), torch.zeros(1, dtype=torch.long) + length)
        if alike:
            _fail_alike(ctx, length, alike, "what the first block receives is the same")
        return
    kinds = one_of_each_kind(subject.config, stack)
    length = subject.longest(LONGEST)
    ids = subject.probe_ids(1, 1).expand(1, length)
    blind: list[tuple[int, int]] = []
    reasons: list[str] = []
    for index in kinds:
        stated = stated_window(subject, index, len(stack))
        if isinstance(stated, str):
            reasons.append(f"block {index} {stated}")
            continue
        step = QUERY_STEP if stated is None else max(1, min(QUERY_STEP, stated - 1))
        queries = list(range(length - 1, 0, -step))
        influence = influence_of(subject, ctx, stack, index, ids, queries)
        if influence is None:
            reasons.append(f"the input of block {index} takes no gradient")
            continue
        earlier = torch.arange(length)[None] < torch.tensor(queries)[:, None]
        if len(kinds) > 1 and not bool((influence.abs().amax(-1)[earlier] > 0).any()):
            continue  # the feed-forward part of a layer
        alike = _alike(influence, torch.tensor(queries))
        if alike and (influence := damped_influence(subject, ctx, index, ids, queries)) is not None:
            alike = [pair for pair in _alike(influence, torch.tensor(queries)) if pair in set(alike)]
        if not alike:
            return
        if len(alike) < length * (length - 1) // 3:
            _fail_alike(ctx, length, alike, "every later position weighs them the same")
        blind = blind or alike
    if blind and not reasons:
        _fail_alike(ctx, length, blind, "every later position weighs them the same")
    if blind:
        reasons.append("blocks of another kind see no positions at all, and rely on these")
    ctx.not_applicable("; ".join(reasons) or "no block alone lets a token feel an earlier one")


def _taken(subject: Specimen, ctx: Context, received: Tensor, wanted: int) -> tuple[Tensor, int]:
    """What the first block receives for as many tokens as are taken, up to `wanted`; and how many that is.

    `received` is for fewer. Where a context is stated, all of it must be taken.
    """
    taken, refused, stated = received.shape[0], wanted + 1, structure.context_length(subject.module)
    while refused - taken > 1:
        time = wanted if refused > wanted else (taken + refused) // 2
        try:
            longer = constant_inputs(subject, time)
        except Exception as error:
            if stated is not None or isinstance(error, MemoryError) or "allocate memory" in str(error):
                raise
            refused, reason = time, f"{type(error).__name__}: {first_line(error)}"
            continue
        assert longer is not None
        received, taken = longer, time
    if taken < wanted:
        ctx.note(f"no context length is stated; {taken} tokens are looked at, since {refused} raise {reason}")
    return received, taken


def _spread(rows: Tensor) -> float:
    return float((rows - rows[:1]).abs().max() / rows.abs().max().clamp(min=1e-30))


def _alike(signature: Tensor, before: Tensor) -> list[tuple[int, int]]:
    """Pairs of places that no query tells apart. `signature` [query, place, width]; a query counts for places below
    `before[query]`, and for pairs of which it feels one."""
    import torch

    time = signature.shape[1]
    told = torch.zeros(time, time, dtype=torch.bool, device=signature.device)
    asked = torch.zeros(time, time, dtype=torch.bool, device=signature.device)
    for rows, end in zip(signature, before.tolist(), strict=True):
        rows = rows[:end]
        scale = rows.abs().amax(-1)
        scale = torch.maximum(scale[:, None], scale[None])
        told[:end, :end] |= torch.cdist(rows, rows, p=float("inf")) > 64 * 1.2e-7 * scale
        asked[:end, :end] |= scale > 0
    same = (asked & ~told).triu(1)
    return [(one, other) for one, other in same.nonzero().tolist()]


def _fail_alike(ctx: Context, length: int, alike: list[tuple[int, int]], evidence: str) -> Never:
    one, other = alike[0]
    gap = {b - a for a, b in alike}
    if len(gap) == 1 and min(gap) > 1:
        hint = Hint(
            f"positions repeat every {min(gap)}: a modulo, or a table shorter than the context that wraps around",
            "position.collision",
        )
    elif len({a for a, _ in alike} | {b for _, b in alike}) == max(b for _, b in alike) - one + 1 and one > 0:
        hint = Hint(f"all positions from {one} on are one: a clamp to the table's last row", "position.collision")
    elif 2 * len(alike) >= MOST * length * (length - 1):
        hint = Hint(
            "hardly any position is told from another: the encoding is not applied, or is the same for all",
            "position.absent",
            "position.no_op",
            "position.collision",
        )
    else:
        hint = Hint(
            "positions are rounded, divided or made in a type too small for them, or the encoding is not applied",
            "position.collision",
            "position.absent",
        )
    ctx.fail(
        f"positions {one} and {other} are treated alike: {evidence}"
        + (f" (and {len(alike) - 1} more pairs)" if len(alike) > 1 else ""),
        where=f"positions {one} and {other}",
        hint=hint,
    )
    raise AssertionError("fail() leaves the check")


@register_check(
    "positions.defaults",
    holds="explicit 0..T-1 equals the default, at every length up to the context",
    needs=("pos",),
    profile="smoke",
    requires=COMPARES_LOGITS,
    space={"time": Span(1, LONGEST)},
    grid=tuple({"time": time} for time in (1, 2, 9, 33, 65, LONGEST)),
)
def check_defaults(subject: Specimen, ctx: Context) -> None:
    """Lengths on either side of 8, 32 and 64, and the whole context."""
    import torch

    if subject.convention.positions in dict(subject.convention.filled):
        ctx.not_applicable(f"forward() requires {subject.convention.positions}: it has no default")
    for case in ctx.cases():
        ids = ctx.ids(1, subject.longest(case.time))
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        first = subject.first_position
        ctx.equal(
            subject.logits(ids, positions=positions),
            subject.logits(ids),
            "logits with position_ids 0..T-1 passed differ from logits without",
            hint=f"the default positions start at {first}, behind a row for padding: whoever counts from 0, as "
            "generate() does, reads other rows of the table"
            if first
            else Hint(
                "the default positions do not start at 0 or do not count by 1, or given ones take another path",
                "position.offset",
            ),
        )
        if subject.can("mask"):
            ctx.equal(
                subject.logits(ids, mask=torch.ones_like(ids)),
                subject.logits(ids),
                "logits with a padding mask that hides nothing differ from logits without one",
                hint=Hint(
                    "positions counted from the mask start at another number than those counted without: "
                    "cumsum() - 1, or the mask takes another path",
                    "position.offset",
                    "mask.fast_path",
                ),
            )
