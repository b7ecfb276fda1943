"""positions: order is seen, every position is reached and told apart, and shifting means what it should."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Never

from lmconform import tolerance
from lmconform.cases import Choice, Span
from lmconform.checks.first_block import alone, block_input, blocks, constant_inputs
from lmconform.registry import register_check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

SOUND = ("contract.shape", "contract.finite", "contract.repeatable")
LONGEST = 128  # positions looked at where the context is longer
TABLE = 2048  # rows of an absolute encoding looked at
QUERY_STEP = 8
FAR = 4000
DRIFT_FACTOR = 3.0  # two independent roundings differ by sqrt(2) of one; a collapsed position by tens
PER_LAYER = ("layer_types", "layers_block_type", "block_types", "attention_layers", "attn_layers")
SUBSET = ("index_topk", "indexer_budget", "index_topk_blocks", "num_buckets", "compress_rates")


def _stack(subject: Specimen, ctx: Context) -> list[nn.Module]:
    stack = blocks(subject)
    if stack is None:
        _leave(ctx, "no list of blocks was found that a forward calls once each, in order")
    return stack


def _leave(ctx: Context, reason: str) -> Never:
    ctx.not_applicable(reason)
    raise AssertionError("not_applicable() leaves the check")


@register_check(
    "positions.order_matters",
    holds="swapping two earlier tokens changes later logits with the first block alone",
    profile="smoke",
    requires=SOUND,
    space={"time": Span(3, 40)},
    grid=({"time": 16},),
)
def check_order_matters(subject: Specimen, ctx: Context) -> None:
    """Every pair of neighbours swapped, one a row; all blocks but the first hand their input on.

    The first block alone: without positions it sees a set of earlier tokens, while a deeper causal stack finds the
    order by itself (Haviv et al. 2022, "Transformer Language Models without Positional Encodings Still Learn
    Positional Information").
    """
    import torch

    stack = _stack(subject, ctx)
    if _states(subject.config, "no_rope_layers") and not subject.config.no_rope_layers[0]:
        ctx.not_applicable("the config states that the first block goes without positions (no_rope_layers)")
    for case in ctx.cases():
        time = subject.longest(case.time)
        base = _unlike_neighbours(subject, ctx, time)
        swapped = base.repeat(time - 2, 1)
        first = torch.arange(time - 2)
        swapped[first, first], swapped[first, first + 1] = base[0, 1:-1], base[0, :-2]
        with alone(stack):
            logits = subject.logits(torch.cat([base, swapped]))
        later = torch.arange(time)[None] > first[:, None] + 1
        change = (logits[1:].double() - logits[:1].double()).abs().amax(-1).cpu().masked_fill(~later, 0).amax(-1)
        floor = tolerance.allowed(subject.noise, logits)
        blind = (change <= floor).nonzero().flatten().tolist()
        if blind:
            everywhere = len(blind) == time - 2
            ctx.fail(
                "the first block alone does not see the order of earlier tokens: swapping tokens "
                f"{blind[0]} and {blind[0] + 1} changed no later logit"
                + ("" if everywhere else f" ({len(blind)} of {time - 2} pairs of neighbours)")
                + f" (by {float(change[blind[0]]):.3g}; rounding alone by up to {floor:.3g})",
                where=f"positions {blind[0]} and {blind[0] + 1}",
                hint="no position encoding reaches attention: it is never applied, or applied to the wrong tensor, or "
                "all positions are the same number"
                if everywhere
                else "neighbouring positions share one encoding: look at how position ids are made (integer division, "
                "rounding, a clamp)",
            )


def _unlike_neighbours(subject: Specimen, ctx: Context, time: int) -> Tensor:
    """Ordinary tokens [1, time], each unlike the one before."""
    import torch

    ordinary = subject.ordinary_ids
    steps = torch.randint(1, len(ordinary), (1, time), generator=ctx.generator(time))
    return torch.tensor(ordinary)[steps.cumsum(-1) % len(ordinary)].to(subject.device)


def _states(config: Any, name: str) -> bool:
    return bool(getattr(config, name, None))


@register_check(
    "positions.reach",
    holds="every earlier token can influence the last logit; a stated window cuts exactly where it says",
    requires=SOUND,
)
def check_reach(subject: Specimen, ctx: Context) -> None:
    """Each block alone: the gradient of every logit with respect to each earlier input of the block, zero or not.

    A window of w tokens means, as in transformers, the token itself and w - 1 before it.
    """
    stack = _stack(subject, ctx)
    context = subject.longest(LONGEST)
    looked = False
    for index in range(min(len(stack), 8)):
        stated = _stated_window(subject, index, len(stack))
        if isinstance(stated, str):
            ctx.note(f"block {index} {stated}")
            continue
        looked = True
        short = subject.longest(40 if stated is None else min(stated + 8, LONGEST))
        _reach_of(subject, ctx, stack, index, stated, list(range(short)), short)
        if context > short:
            _reach_of(subject, ctx, stack, index, stated, [context - 1], context)
    if not looked:
        ctx.not_applicable("; ".join(ctx.notes))


def _reach_of(
    subject: Specimen, ctx: Context, stack: list[nn.Module], index: int, window: int | None, queries: list[int], time: int
) -> None:
    import torch

    influence = _influence(subject, ctx, stack, index, ctx.ids(1, time), queries)
    if influence is None:
        ctx.note(f"block {index}: its input could not be told")
        return
    felt = influence.abs().amax(-1) > 0  # [query, position]
    query, position = torch.tensor(queries)[:, None], torch.arange(time)[None]
    past = position <= query
    inside = past if window is None else past & (position > query - window)
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
                hint="attention is cut short: a local mask, a truncated cache or a bucketed bias that ends, or a mask "
                "that leaves out whole tokens",
            )
        ctx.fail(
            f"the window of {window} tokens that the config states is not what is cut: position {at} feels token "
            f"{min(seen, default=at)}, {reach} tokens back counting itself"
            if what == "open"
            else f"the window of {window} tokens that the config states is cut short: position {at} does not feel token "
            f"{place}, {at - place + 1} tokens back counting itself",
            where=where,
            hint="an off-by-one in the window (key > query - window keeps the token itself and window - 1 before it), "
            "or the layer ignores the window",
        )


def _stated_window(subject: Specimen, index: int, layers: int) -> int | str | None:
    """What the config states for this block: a window, None for all earlier tokens, or why it cannot be told."""
    config = subject.config
    for name in SUBSET:
        if _states(config, name):
            return f"attends to a chosen part of the tokens ({name})"
    for name in PER_LAYER:
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and len(kinds) >= layers and all(isinstance(k, str) for k in kinds):
            kind = str(kinds[index])
            if "sliding" in kind or "local" in kind:
                return subject.window or f"is of kind {kind!r}, and no window is stated"
            if kind in ("full_attention", "global", "global_attention", "attention"):
                return None
            return f"is of kind {kind!r}, which states no reach"
    return subject.window


def _influence(
    subject: Specimen, ctx: Context, stack: list[nn.Module], index: int, ids: Tensor, queries: Sequence[int]
) -> Tensor | None:
    """d (a random mix of the logits at each query) / d (block `index`'s input), that block alone: [query, time, width].

    One row a query, so that one backward pass gives them all. None where the block's input cannot be told.
    """
    import torch

    rows = torch.arange(len(queries))
    with alone(stack, index) as inputs:
        logits = subject.logits(ids.expand(len(queries), -1).contiguous(), grad=True)
    if len(inputs) != 1 or inputs[0].shape[:2] != (len(queries), ids.shape[1]):
        return None
    mix = torch.randn(logits.shape[-1], generator=ctx.generator(index)).to(logits)
    total = (logits[rows, list(queries)] @ mix).sum()
    if not total.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(total, inputs, allow_unused=True)
    return None if gradient is None else gradient.detach().flatten(2).double().cpu()


@register_check(
    "positions.distinct",
    holds="no two positions in the stated context are treated alike, to the end of it",
    requires=SOUND,
)
def check_distinct(subject: Specimen, ctx: Context) -> None:
    """One token over and over: whatever differs between two places is the position encoding.

    Absolute encodings show in what the first block receives. Otherwise the first block alone is asked how much each
    place weighs (the gradient with respect to it) for queries all over the context.
    """
    import torch

    stack = _stack(subject, ctx)
    length = subject.longest(TABLE)
    received = constant_inputs(subject, subject.longest(LONGEST))
    if received is None:
        _leave(ctx, "what the first block receives cannot be told")
    if _spread(received) > 1e-5:
        if length > received.shape[0]:
            received = constant_inputs(subject, length)
            assert received is not None
        alike = _alike(received[None].double(), torch.zeros(1, dtype=torch.long) + length)
        if alike:
            _fail_alike(ctx, alike, "what the first block receives is the same")
        return
    stated = _stated_window(subject, 0, len(stack))
    if isinstance(stated, str):
        ctx.not_applicable(f"the first block {stated}")
    length = subject.longest(LONGEST)
    step = QUERY_STEP if stated is None else max(1, min(QUERY_STEP, stated - 1))
    queries = list(range(length - 1, 0, -step))
    ids = subject.probe_ids(1, 1).expand(1, length)
    influence = _influence(subject, ctx, stack, 0, ids, queries)
    if influence is None:
        _leave(ctx, "the first block's input takes no gradient")
    alike = _alike(influence, torch.tensor(queries))
    if alike:
        _fail_alike(ctx, alike, "every later position weighs them the same")


def _spread(rows: Tensor) -> float:
    return float((rows - rows[:1]).abs().max() / rows.abs().max().clamp(min=1e-30))


def _alike(signature: Tensor, before: Tensor) -> list[tuple[int, int]]:
    """Pairs of places that no query tells apart. `signature` [query, place, width]; a query counts for places below
    `before[query]`."""
    import torch

    time = signature.shape[1]
    told = torch.zeros(time, time, dtype=torch.bool)
    asked = torch.zeros(time, time, dtype=torch.bool)
    for rows, end in zip(signature, before.tolist(), strict=True):
        rows = rows[:end]
        scale = rows.abs().amax(-1)
        scale = torch.maximum(scale[:, None], scale[None])
        told[:end, :end] |= torch.cdist(rows, rows, p=float("inf")) > 64 * 1.2e-7 * scale
        asked[:end, :end] = True
    same = (asked & ~told).triu(1)
    return [(one, other) for one, other in same.nonzero().tolist()]


def _fail_alike(ctx: Context, alike: list[tuple[int, int]], evidence: str) -> Never:
    one, other = alike[0]
    gap = {b - a for a, b in alike}
    if len(gap) == 1 and min(gap) > 1:
        hint = f"positions repeat every {min(gap)}: a modulo, or a table shorter than the context that wraps around"
    elif len({a for a, _ in alike} | {b for _, b in alike}) == max(b for _, b in alike) - one + 1 and one > 0:
        hint = f"all positions from {one} on are one: a clamp to the table's last row"
    else:
        hint = "positions are rounded, divided or made in a type too small for them, or the encoding is not applied"
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
    requires=SOUND,
    space={"time": Span(1, LONGEST)},
    grid=tuple({"time": time} for time in (1, 2, 9, 33, 65, LONGEST)),
)
def check_defaults(subject: Specimen, ctx: Context) -> None:
    """Lengths on either side of 8, 32 and 64, and the whole context."""
    import torch

    for case in ctx.cases():
        ids = ctx.ids(1, subject.longest(case.time))
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        ctx.equal(
            subject.logits(ids, positions=positions),
            subject.logits(ids),
            "logits with position_ids 0..T-1 passed differ from logits without",
            hint="the default positions do not start at 0 or do not count by 1, or given ones pass through another path",
        )


@register_check(
    "positions.shift",
    holds="where relative: adding a constant to position_ids leaves logits alone",
    needs=("pos",),
    requires=SOUND,
    space={"by": Choice("one", "some", "end"), "time": Span(2, 40)},
    grid=({"by": "one", "time": 24}, {"by": "some", "time": 24}, {"by": "end", "time": 24}),
)
def check_shift(subject: Specimen, ctx: Context) -> None:
    """Positions are relative where the first block receives the same whatever they are, and yet they matter.

    By 1, by some, and up to the end of the context.
    """
    import torch

    for case in ctx.cases():
        time = subject.longest(case.time)
        room = _room(subject, ctx, LONGEST) - time
        if room < 1:
            _leave(ctx, "the context leaves no room to shift in")
        by = {"one": 1, "some": min(19, room), "end": room}[case.by]
        ids = ctx.ids(1, time)
        positions = torch.arange(time, device=ids.device)[None]
        _relative(subject, ctx, ids, positions, by)
        ctx.equal(
            subject.logits(ids, positions=positions + by),
            subject.logits(ids, positions=positions),
            f"logits change when every position moves by {by}, though nothing but attention sees the positions",
            hint="attention depends on absolute positions: queries or keys alone are rotated, or by different angles, or "
            "positions are clamped or wrapped inside the context",
        )


def _relative(subject: Specimen, ctx: Context, ids: Tensor, positions: Tensor, by: int) -> None:
    """Leaves the check where positions are absolute, by their place in the model or by what the config states."""
    import torch

    config = subject.config
    if _states(config, "attn_temperature_tuning") or _states(config, "log_scaling_n_floor"):
        ctx.not_applicable("the config scales attention by the absolute position (attn_temperature_tuning)")
    near = block_input(subject, ids, positions=positions)
    far = block_input(subject, ids, positions=positions + by)
    if near is None or far is None:
        _leave(ctx, "what the first block receives cannot be told, so neither whether positions are relative")
    if not torch.equal(near, far):
        ctx.not_applicable("positions are absolute: they are added to what the first block receives")
    spaced = subject.logits(ids, positions=positions * 2 + (torch.arange(ids.shape[1]) % 2).to(positions))
    change = float((spaced - subject.logits(ids, positions=positions)).abs().max())
    if change <= tolerance.allowed(subject.noise, spaced):
        ctx.not_applicable(f"{subject.convention.positions} has no effect on the logits")


def _room(subject: Specimen, ctx: Context, wanted: int) -> int:
    """Positions within which one set of frequencies holds: dynamic kinds of rescaling change them with the length."""
    kinds, original = _frequency_kinds(subject.config)
    if kinds & {"dynamic", "longrope"}:
        if original is None:
            _leave(ctx, f"rotary frequencies change with the length ({', '.join(sorted(kinds))})")
        wanted = min(wanted, original)
    return subject.longest(wanted)


def _frequency_kinds(config: Any) -> tuple[set[str], int | None]:
    """Names of the rotary rescalings that the config states, and the context they start from."""
    found: set[str] = set()
    original: int | None = getattr(config, "original_max_position_embeddings", None)
    pending = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    while pending:
        part = pending.pop()
        if not isinstance(part, dict):
            continue
        pending.extend(part.values())
        kind = part.get("rope_type", part.get("type"))
        if isinstance(kind, str):
            found.add(kind)
        original = original or part.get("original_max_position_embeddings")
    if "dynamic" in found and original is None:
        original = getattr(config, "max_position_embeddings", None)
    return found, original


@register_check(
    "positions.precision",
    holds=f"the encoding keeps its precision in half types far out (position {FAR} against float64)",
    needs=("pos",),
    requires=SOUND,
    space={"dtype": Choice("bfloat16", "float16")},
    grid=({"dtype": "bfloat16"}, {"dtype": "float16"}),
)
def check_precision(subject: Specimen, ctx: Context) -> None:
    """Half-precision logits far out against those near position 0, in units of what half precision costs near 0.

    Relative positions: both are the same in exact arithmetic. Absolute ones: each is held against its own float32 or
    float64 value, in what the first block receives. Positions or angles made in bfloat16 collapse from 256 on, in
    float16 from 2048 on (transformers issue 25681 among others).
    """
    import torch

    time = subject.longest(24)
    ids = ctx.ids(4, time)
    near = torch.arange(time, device=ids.device).expand(4, time)
    kinds, _ = _frequency_kinds(subject.config)
    if kinds & {"dynamic", "longrope"}:
        ctx.not_applicable(f"rotary frequencies change with the length ({', '.join(sorted(kinds))})")
    exact = subject.twin() or subject
    absolute = _absolute(exact, ids, near)
    if absolute:
        far = _far_absolute(exact, ctx, ids, near)
    else:
        far = near + FAR
        try:
            _relative(exact, ctx, ids, near, FAR)
        except (IndexError, RuntimeError, ValueError) as error:
            _leave(ctx, f"takes no position {FAR} ({type(error).__name__})")
    ran = False
    for case in ctx.cases():
        half = subject.copy()
        half.module.to(getattr(torch, case.dtype))
        ask = block_input if absolute else _logits
        try:
            measured_near, measured_far = ask(half, ids, positions=near), ask(half, ids, positions=far)
        except Exception as error:
            ctx.note(f"does not run in {case.dtype} ({type(error).__name__})")
            continue
        right_near, right_far = ask(exact, ids, positions=near), ask(exact, ids, positions=far)
        if measured_near is None or measured_far is None or right_near is None or right_far is None:
            continue
        ran = True
        cost = max(_drift(measured_near, right_near), tolerance.epsilon(half.dtype) * float(right_near.std()) / 8)
        ctx.within(
            _drift(measured_far, right_far), DRIFT_FACTOR * cost,
            f"in {case.dtype} at positions from {int(far[0, 0])} on, {'encodings' if absolute else 'logits'} drift from "
            f"{_name(exact)} far more than near position 0",
            hint="positions, frequencies or angles are made in half precision: make them in float32 and cast cos and "
            "sin (or the finished encoding) at the end",
        )  # fmt: skip
    if not ran:
        ctx.not_applicable("; ".join(ctx.notes) or "nothing to compare")


def _logits(subject: Specimen, ids: Tensor, **inputs: Any) -> Tensor:
    return subject.logits(ids, **inputs)


def _absolute(subject: Specimen, ids: Tensor, positions: Tensor) -> bool:
    """Whether what the first block receives depends on the positions."""
    import torch

    near, turned = block_input(subject, ids, positions=positions), block_input(subject, ids, positions=positions.flip(-1))
    return near is not None and turned is not None and not torch.equal(near, turned)


def _far_absolute(subject: Specimen, ctx: Context, ids: Tensor, near: Tensor) -> Tensor:
    """The farthest positions that an absolute encoding takes, up to FAR."""
    for start in (FAR, (subject.context_length or FAR) - ids.shape[1]):
        if start < 512:
            break
        try:
            block_input(subject, ids, positions=near + start)
        except (IndexError, RuntimeError, ValueError):  # the table ends before: try the stated context
            continue
        return near + start
    _leave(ctx, "the position table ends before half precision could lose positions")


def _drift(actual: Tensor, exact: Tensor) -> float:
    """The typical error of a token: the median over tokens, so that one flipped expert does not decide."""
    return float((actual.double() - exact.double()).square().mean(-1).sqrt().median())


def _name(subject: Specimen) -> str:
    return str(subject.dtype).removeprefix("torch.")
