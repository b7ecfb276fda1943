"""cache: a key/value cache or recurrent state changes what is computed again, never what comes out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.cases import Choice, Span
from lmconform.checks.causality import known_leak
from lmconform.checks.padding import mask_for
from lmconform.context import Hint
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

MASKS = Choice("none", "ones")  # no attention_mask at all, or ones over past and new tokens: two branches of a model


@register_check(
    "cache.decode",
    holds="token-by-token equals one forward, at every split, across window edges",
    needs=("cache",),
    requires=COMPARES_LOGITS,
    profile="smoke",
    space={"prefill": Span(0, 126), "steps": Span(1, 127), "mask": MASKS},
    grid=(
        {"prefill": 0, "steps": 3, "mask": "none"},
        {"prefill": 13, "steps": 6, "mask": "ones"},
        {"prefill": 30, "steps": 4, "mask": "none"},
        {"prefill": 62, "steps": 4, "mask": "ones"},
    ),
)
def check_decode(subject: Specimen, ctx: Context) -> None:
    """A prefix at once, then single tokens on its cache; every position against one forward without a cache.

    The prefixes lie so that the single tokens cross 16, 32 and 64 tokens and any sliding window there.
    """
    for case in ctx.cases():
        total = subject.longest(max(case.prefill + case.steps, 2))
        prefill = min(case.prefill, total - 1)
        sizes = [prefill] * (prefill > 0) + [1] * (total - prefill)
        _compare_chunks(
            subject, ctx, sizes, case.mask, f"logits of token-by-token decoding after {prefill or 'no'} tokens at once"
        )


@register_check(
    "cache.decode_long",
    holds="token-by-token equals one forward from the first token to the end of the context",
    needs=("cache",),
    requires=COMPARES_LOGITS,
    profile="thorough",
    space={"time": Span(2, 128), "mask": MASKS},
    grid=({"time": 128, "mask": "none"}, {"time": 128, "mask": "ones"}),
)
def check_decode_long(subject: Specimen, ctx: Context) -> None:
    """Single tokens only, over 128 tokens or the whole context: no position is skipped."""
    for case in ctx.cases():
        sizes = [1] * subject.longest(case.time)
        _compare_chunks(subject, ctx, sizes, case.mask, "logits of token-by-token decoding from the first token")


@register_check(
    "cache.chunks",
    holds="any chunking (1, 2, k, ragged) equals one forward",
    needs=("cache",),
    requires=COMPARES_LOGITS,
    space={"time": Span(2, 128), "chunk": Choice(1, 2, 3, 7, 16, 17, "ragged"), "seed": Span(0, 99), "mask": MASKS},
    grid=(
        {"time": 12, "chunk": 1, "seed": 0, "mask": "none"},
        {"time": 24, "chunk": 2, "seed": 0, "mask": "ones"},
        {"time": 37, "chunk": 7, "seed": 0, "mask": "none"},
        {"time": 70, "chunk": 17, "seed": 0, "mask": "none"},
        {"time": 70, "chunk": "ragged", "seed": 0, "mask": "none"},
        {"time": 128, "chunk": "ragged", "seed": 1, "mask": "ones"},
    ),
)
def check_chunks(subject: Specimen, ctx: Context) -> None:
    """The sequence in chunks of 1, 2, 7, 17 and of mixed sizes, each on the cache of those before it."""
    for case in ctx.cases():
        total = subject.longest(case.time)
        if case.chunk == "ragged":
            sizes = _ragged(ctx, total, case.seed)
        else:
            sizes = [case.chunk] * (total // case.chunk) + [total % case.chunk] * (total % case.chunk > 0)
        _compare_chunks(subject, ctx, sizes, case.mask, f"logits of chunked decoding ({case.chunk} at a time)")


@register_check(
    "cache.reuse",
    holds="copies of one prefix cache are independent and give the same twice; a tuple cache itself can be used twice",
    needs=("cache",),
    requires=(*COMPARES_LOGITS, "cache.decode"),
    space={"time": Span(1, 64), "steps": Span(2, 16)},
    grid=({"time": 5, "steps": 3}, {"time": 21, "steps": 2}),
)
def check_reuse(subject: Specimen, ctx: Context) -> None:
    """One prefix is continued in two ways, in turns, and then the first way again.

    A `Cache` object is mutable by convention, so each way takes a deep copy (the documented way of reusing a prompt,
    https://huggingface.co/docs/transformers/kv_cache); a tuple is given as it is. In turns, because a write into
    shared memory shows only when the other continuation goes on.
    """
    import torch

    for case in ctx.cases():
        total = subject.longest(case.time + case.steps)
        if total < 3:
            ctx.not_applicable(f"needs 3 tokens; the context is {total}")
        steps = min(case.steps, total - 1)
        time = total - steps
        prefix = ctx.ids(2, time)
        one, two = ctx.ids(2, steps, salt=1), ctx.ids(2, steps, salt=2)
        expected = subject.logits(torch.cat([torch.cat([prefix, one], 1), torch.cat([prefix, two], 1)]))[:, time:]
        cache = subject.forward(prefix, use_cache=True).cache
        itself = isinstance(cache, tuple)
        what = "the same tuple cache, used twice," if itself else "deep copies of one prefix cache"
        hint = (
            Hint(
                "the cache is changed in place (index_copy_, a preallocated buffer): give back new tensors",
                "cache.mutated_in_place",
            )
            if itself
            else Hint(
                "the copies share memory or state (a __deepcopy__ that copies references, tensors kept on the module)",
                "cache.mutated_in_place",
                "state.carried_over",
            )
        )

        first, second, third = (cache,) * 3 if itself else tuple(_deep_copy(ctx, cache) for _ in range(3))
        early_one, first = _step(subject, ctx, one[:, :1], first)
        early_two, second = _step(subject, ctx, two[:, :1], second)
        late_one, _ = _continue(subject, ctx, one[:, 1:], first)
        late_two, _ = _continue(subject, ctx, two[:, 1:], second)
        again, _ = _continue(subject, ctx, one, third)
        ones, twos = torch.cat([early_one, late_one], 1), torch.cat([early_two, late_two], 1)
        ctx.equal(ones, expected[:2], f"{what} are not independent: the first continuation changed", hint=hint)
        ctx.equal(twos, expected[2:], f"{what} are not independent: the second continuation changed", hint=hint)
        ctx.equal(again, ones, f"{what} do not give the same twice: the same tokens give other logits", hint=hint)


@register_check(
    "cache.reorder",
    holds="beams: reordering the cache equals recomputing",
    needs=("cache",),
    requires=(*COMPARES_LOGITS, "cache.decode"),
    space={"beams": Span(2, 5), "time": Span(1, 40), "steps": Span(1, 4), "seed": Span(0, 99)},
    grid=(
        {"beams": 2, "time": 4, "steps": 1, "seed": 0},
        {"beams": 3, "time": 7, "steps": 3, "seed": 1},
        {"beams": 5, "time": 20, "steps": 2, "seed": 2},
    ),
)
def check_reorder(subject: Specimen, ctx: Context) -> None:
    """Rows are reordered and repeated before every step, as beam search does, and recomputed without a cache.

    The way is the cache's own reorder_cache(), else the model's _reorder_cache(), else the rows of its plain tensors.
    """
    import torch

    for case in ctx.cases():
        steps = min(case.steps, subject.longest(128) - 1)
        sequences = ctx.ids(case.beams, subject.longest(case.time + steps) - steps)
        cache = subject.forward(sequences, use_cache=True).cache
        way = _way_of_reordering(subject, ctx, cache)
        generator = ctx.generator(case.seed)
        for step in range(steps):
            order = torch.randint(case.beams, (case.beams,), generator=generator)
            if step == 0:
                order[0], order[-1] = case.beams - 1, case.beams - 1  # the first row is dropped, the last one doubled
            order = order.to(sequences.device)
            cache = _reorder(subject, ctx, cache, order, way)
            token = ctx.ids(case.beams, 1, salt=10 + step)
            sequences = torch.cat([sequences[order], token], dim=1)
            logits, cache = _step(subject, ctx, token, cache)
            ctx.equal(
                logits,
                subject.logits(sequences)[:, -1:],
                "logits after reordering the cache differ from recomputing",
                where=f"step {step}, beam order {order.tolist()}, reordered by {way}",
                hint=Hint(
                    "some layer's keys, values or state were not index_select-ed along the batch dimension, or the "
                    "model keeps something per row outside the cache",
                    "cache.not_reordered",
                ),
            )


def _compare_chunks(subject: Specimen, ctx: Context, sizes: Sequence[int], masks: str, message: str) -> None:
    """Run the chunks one after another on the cache and compare every position with one forward."""
    import torch

    total = sum(sizes)
    ids = ctx.ids(2, total)
    with_mask = masks == "ones" and bool(subject.can("mask"))
    whole = subject.logits(ids, mask=torch.ones_like(ids) if with_mask else None)
    parts: list[Tensor] = []
    starts: list[int] = []
    cache: Any = None
    start = 0
    for size in sizes:
        mask = mask_for(subject, torch.ones_like(ids[:, : start + size]), size) if with_mask else None
        logits, cache = _step(subject, ctx, ids[:, start : start + size], cache, mask)
        parts.append(logits)
        starts.append(start)
        start += size
    decoded = torch.cat(parts, dim=1)
    hint = ""
    if decoded.shape == whole.shape:
        bad = (decoded.double() - whole.double()).abs().nan_to_num(nan=float("inf")).amax(dim=(0, 2))
        wrong = (bad > tolerance.allowed(subject.noise, whole)).nonzero().flatten().tolist()
        if wrong and wrong[0] < sizes[0]:
            hint = known_leak(subject) or _carried(subject, ids[:, : sizes[0]], whole)
        hint = hint or _likely(wrong, starts, sizes, subject.window)
    shown = "+".join(map(str, sizes[:8])) + ("+..." if len(sizes) > 8 else "")
    ctx.equal(decoded, whole, f"{message} differ from one forward over the whole", where=f"chunks {shown}", hint=hint)


def _carried(subject: Specimen, ids: Tensor, whole: Tensor) -> str:
    """Whether two calls with use_cache=True, neither given a cache, answer the same: else one is left over."""
    try:
        first, again = (subject.forward(ids, use_cache=True).logits for _ in range(2))
        moved = float((first.double() - again.double()).abs().nan_to_num(nan=float("inf")).max())
    except Exception:  # what is left over grows until it no longer fits
        moved = float("inf")
    if moved <= tolerance.allowed(subject.noise, whole):
        return ""
    return Hint(
        "two calls with use_cache=True that were given no cache differ: what the first left behind is read again (a "
        "default argument such as past_key_values=[] is one list for all calls, or the cache is kept on the module)",
        "state.carried_over",
    )


def _likely(wrong: Sequence[int], starts: Sequence[int], sizes: Sequence[int], window: int | None) -> str:
    """What the set of wrong positions points to."""
    if not wrong:
        return ""
    first = wrong[0]
    if first < sizes[0]:
        return Hint(
            "already the first chunk differs, on no past at all: use_cache=True takes another path",
            "mask.off_by_one",
            "mask.missing",
            "mask.fast_path",
        )
    if window is not None and window - 1 <= first <= window + max(sizes):
        return Hint(
            f"wrong from position {first} on, at the sliding window of {window}: the cache cuts at another place",
            "mask.window",
            "cache.truncated",
        )
    openers = set(starts[1:])
    if any(size > 1 for size in sizes[1:]) and not openers & set(wrong):
        return Hint(
            f"the first token of each chunk is right and later ones are wrong (from position {first}): in a chunk, "
            "query i sees past + i + 1 keys; align the causal mask with the last key (tril with diagonal=past)",
            "mask.query_offset",
            "mask.fast_path",
        )
    if first == sizes[0]:
        return Hint(
            f"wrong from the first cached token on (position {first}): position ids restart at 0 instead of at the "
            "cached length, the cached keys (the recurrent state) are not used or stale, or the mask covers the new "
            "tokens only",
            "position.restarts_on_decode",
            "cache.wrong_value",
            "cache.stale",
            "cache.ignored",
        )
    return Hint(
        f"right up to position {first - 1}: the cache drops, overwrites or misplaces tokens beyond that length",
        *(("cache.stale", "cache.truncated") if first == sizes[0] + 1 else ("cache.truncated",)),
    )


def _ragged(ctx: Context, total: int, seed: int) -> list[int]:
    """A partition of `total` into chunks of 1 to 24, the same for the same seed."""
    import torch

    generator = ctx.generator(seed, total)
    sizes: list[int] = []
    while sum(sizes) < total:
        size = int(torch.randint(1, 25, (1,), generator=generator))
        sizes.append(min(size, total - sum(sizes)))
    return sizes


def _step(subject: Specimen, ctx: Context, ids: Tensor, cache: Any, mask: Tensor | None = None) -> tuple[Tensor, Any]:
    """Logits and cache of one more piece; a cache that does not come back is a finding."""
    output = subject.forward(ids, cache=cache, use_cache=True, mask=mask)
    if output.cache is None:
        ctx.fail(
            f"forward() on {'a' if cache is not None else 'no'} cache gave no cache back",
            hint=Hint("return the grown cache whenever use_cache=True", "cache.ignored"),
        )
    return output.logits, output.cache


def _continue(subject: Specimen, ctx: Context, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Token by token, so that only what every cache promises is asked for."""
    import torch

    parts: list[Tensor] = []
    for index in range(ids.shape[1]):
        logits, cache = _step(subject, ctx, ids[:, index : index + 1], cache)
        parts.append(logits)
    return torch.cat(parts, dim=1), cache


def _deep_copy(ctx: Context, cache: Any) -> Any:
    try:
        return copy.deepcopy(cache)
    except Exception as error:
        ctx.fail(
            f"the {type(cache).__name__} of a prefix cannot be deep-copied: {type(error).__name__}: {error}",
            hint="keep plain tensors in the cache, made under no_grad, and nothing that cannot be copied",
        )


# -- reordering --------------------------------------------------------------------------------------------------------


def _way_of_reordering(subject: Specimen, ctx: Context, cache: Any) -> str:
    if callable(getattr(cache, "reorder_cache", None)):
        return f"{type(cache).__name__}.reorder_cache()"
    if callable(getattr(subject.module, "_reorder_cache", None)):
        return f"{type(subject.module).__name__}._reorder_cache()"
    if _tensors(cache):
        return "index_select on its tensors"
    ctx.not_applicable(
        f"a {type(cache).__name__} has no reorder_cache(), the model no _reorder_cache(), and it is no nested tuple, "
        "list or dict of tensors whose rows could be picked"
    )
    raise AssertionError


def _reorder(subject: Specimen, ctx: Context, cache: Any, order: Tensor, way: str) -> Any:
    if way.startswith("index_select"):
        small, large = (_shapes(subject.forward(ctx.ids(batch, 3), use_cache=True).cache) for batch in (1, 2))
        axes = [_batch_axis(a, b) for a, b in zip(small, large, strict=True)]
        return _picked(cache, order, iter(axes))
    method = getattr(cache, "reorder_cache", None)
    own: Any = getattr(subject.module, "_reorder_cache", None)
    returned = method(order) if callable(method) else own(cache, order)
    return cache if returned is None else returned


def _tensors(cache: Any) -> list[Tensor]:
    import torch

    if isinstance(cache, torch.Tensor):
        return [cache]
    if isinstance(cache, dict):
        cache = list(cache.values())
    if isinstance(cache, tuple | list):
        return [tensor for item in cache for tensor in _tensors(item)]
    return []


def _shapes(cache: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in _tensors(cache)]


def _batch_axis(small: Sequence[int], large: Sequence[int]) -> int | None:
    """The axis that grew with the batch from 1 to 2; None where none did (a step counter, a shared table)."""
    if len(small) != len(large):
        return None
    return next((axis for axis, (a, b) in enumerate(zip(small, large, strict=True)) if b == 2 * a), None)


def _picked(cache: Any, order: Tensor, axes: Any) -> Any:
    import torch

    if isinstance(cache, torch.Tensor):
        axis = next(axes)
        if axis is None:
            return cache
        if cache.shape[axis] == len(order):
            return cache.index_select(axis, order.to(cache.device))
        # batch and heads folded into one axis, batch first
        rows = cache.unflatten(axis, (len(order), -1)).index_select(axis, order.to(cache.device))
        return rows.flatten(axis, axis + 1)
    if isinstance(cache, dict):
        return {key: _picked(value, order, axes) for key, value in cache.items()}
    if isinstance(cache, tuple | list):
        made = [_picked(item, order, axes) for item in cache]
        return tuple(made) if isinstance(cache, tuple) else made
    return cache
