"""causality: the logits at t depend on the tokens up to t, and on nothing after."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmconform import structure, tolerance
from lmconform.cases import Choice, Span
from lmconform.checks.padding import mask_for
from lmconform.context import Hint
from lmconform.measuring.dropout import without_dropout
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.cases import Case
    from lmconform.context import Context
    from lmconform.specimen import Specimen

SLACK = 3  # padding columns in the padded variants
OVERFLOWS = "not tried with weights x{}: the logits are not finite there"
AXES = ("tokens changed after position", "seen at position")
AT_ONCE = 1 << 25  # logits of one call: every row of a small vocabulary, 128 MiB of float32 of a large one
COMPARED_AT_ONCE = 1 << 19

_hints: weakref.WeakKeyDictionary[Specimen, dict[tuple[str, int], str]] = weakref.WeakKeyDictionary()
_scaled: weakref.WeakKeyDictionary[Specimen, dict[int, Specimen]] = weakref.WeakKeyDictionary()


def futures(ids: Tensor, other: Tensor) -> Tensor:
    """[1, time] twice -> [time, time]: row t keeps the tokens up to t; after t they are the other ones."""
    import torch

    time = ids.shape[1]
    kept = torch.ones(time, time, dtype=torch.bool, device=ids.device).tril()
    return torch.where(kept, ids, other)


def pads(mask: Tensor | None, side: str) -> None:
    """Blank the first (left) or last (right) columns of `mask` in place; other kinds of mask stay full."""
    if mask is not None and side == "left":
        mask[:, :SLACK] = 0
    elif mask is not None and side == "right":
        mask[:, -SLACK:] = 0


def mask_of(kind: str, rows: int, time: int, like: Tensor) -> Tensor | None:
    """The mask [rows, time] of that kind: none, ones, left (-padded) or right."""
    if kind == "none":
        return None
    mask = like.new_ones(rows, time)
    if time > SLACK:
        pads(mask, kind)
    return mask


def watched(time: int, mask: Tensor | None, device: Any) -> Tensor:
    """[t, position]: the places that must not change, real tokens up to t."""
    import torch

    kept = torch.ones(time, time, dtype=torch.bool, device=device).tril()
    return kept if mask is None else kept & mask[:, -time:].bool()


def leak_hint(subject: Specimen, specimen: Specimen, ctx: Context, kind: str) -> str:
    """The likeliest kind of leak, seen over a whole length: a case of two tokens cannot tell one from another."""
    time = subject.longest(70)
    ids = ctx.ids(1, time)
    rows = futures(ids, ctx.other_ids(ids))
    mask = mask_of(kind, time, time, ids)
    compared = watched(time, mask, ids.device)

    def moved(measured: Specimen, mask: Tensor | None = mask) -> Tensor:
        def call(chosen: list[int]) -> Tensor:
            return measured.logits(rows[chosen], mask=None if mask is None else mask[chosen])

        change, last = changes(call, compared, measured.vocab_size)
        return change > tolerance.allowed(measured.noise, last)

    if specimen is not subject and not bool(moved(subject).any()):
        return Hint(
            "the mask is soft: it adds a finite number (-5, -1e4) that larger scores outweigh, or it is added before "
            "the scores are scaled; use -inf or torch.finfo(dtype).min, after scaling",
            "mask.soft",
        )
    if kind == "ones" and not bool(moved(specimen, None).any()):
        return Hint(
            "without attention_mask there is no leak, so the branch that takes one builds no causal mask, or puts the "
            "padding mask in its place",
            "mask.fast_path",
        )
    if kind in ("left", "right") and not bool(moved(specimen, None).any()):
        return Hint(
            "without padding there is no leak: either the padding mask takes the causal mask's place, or real tokens "
            "look at padding, whose own rows are masked everywhere and so average over all tokens",
            "mask.fast_path",
            "mask.padding_ignored",
        )
    return hint_from(moved(specimen), layers_of(subject))


def hint_from(moved: Tensor, layers: int) -> str:
    """The likeliest kind of leak, read off the shape of `moved` [t, position]: where the future was seen."""
    rows = moved[:-1]  # nothing comes after the last t
    leaking = rows.any(dim=1)
    count = int(leaking.sum())
    if count == 0:
        return ""
    first = rows[leaking].int().argmax(dim=1)
    reach = int((leaking.nonzero().flatten() - first).max()) + 1
    if count < len(rows):
        starts = leaking.nonzero().flatten()
        if int(starts[0]) >= 8 and count >= len(rows) - int(starts[0]):
            return Hint(
                f"the leak starts at position {int(starts[0])}: look for a mask buffer, block size or fast path of "
                "that length",
                "mask.block_leak",
                "mask.fast_path",
            )
        return Hint(
            f"only {count} of {len(rows)} positions see the future, so the mask is right in part: look for a mask in "
            "blocks (padded up to a block, or tril inside chunks), one branch, or one head",
            "mask.block_leak",
            "mask.inverted",
        )
    if reach <= layers:
        return Hint(
            "every position sees about one token ahead in each layer: the diagonal of the causal mask is off by one "
            "(tril(diagonal=1), triu(diagonal=2), > for >=), a convolution is padded on both sides, or targets are "
            "mixed into the inputs",
            "mask.off_by_one",
            "mixer.not_causal",
        )
    return Hint(
        "every position sees the whole future: the causal mask is missing, inverted, too soft (-5 for -inf) or never "
        "added to the scores (is_causal=True forgotten), if only in one layer or head, or something else mixes over "
        "time (a pool, a norm, a recurrence run both ways)",
        "mask.missing",
        "mask.inverted",
        "norm.over_sequence",
        "mask.fast_path",
        "mixer.not_causal",
        "mask.soft",
    )


@register_check(
    "causality.no_future_leak",
    holds="changing the tokens after t leaves the logits up to t alone, for every t, mask and size of the weights",
    profile="smoke",
    requires=COMPARES_LOGITS,
    space={"time": Span(2, 70), "mask": Choice("none", "ones", "left", "right"), "weights": Choice(1, 50)},
    grid=(
        {"time": 66, "mask": "none", "weights": 1},
        {"time": 34, "mask": "ones", "weights": 1},
        {"time": 36, "mask": "left", "weights": 1},
        {"time": 36, "mask": "right", "weights": 1},
        {"time": 18, "mask": "none", "weights": 50},
        {"time": 18, "mask": "ones", "weights": 50},
        {"time": 20, "mask": "left", "weights": 50},
        {"time": 20, "mask": "right", "weights": 50},
    ),
)
def check_no_future_leak(subject: Specimen, ctx: Context) -> None:
    """One batch whose row t has other tokens after t; every row is compared with the unchanged one up to its t.

    Each t is tried, because a leak of one token shows only in the row that changes this token, and lengths cross 8,
    16, 32 and 64, the block sizes of kernels. Masks: none, all ones (two code paths in most models), left and right
    padding. With all matrices 50 times as large the scores are in the thousands: a mask that adds -1e4 instead of
    removing the score leaks there.
    """
    for case in ctx.cases():
        if case.mask != "none" and not subject.can("mask"):
            continue
        specimen = subject if case.weights == 1 else heavier(subject, case.weights, ctx)
        if specimen is None:
            continue
        compare_futures(specimen, ctx, case, subject)
    _scaled.pop(subject, None)  # green, so nothing is shrunk: a copy and its float64 twin are three times the weights


def heavier(subject: Specimen, factor: int, ctx: Context) -> Specimen | None:
    """A copy with larger matrices, made once a subject; None where its logits overflow (noted)."""
    made = _scaled.setdefault(subject, {})
    if factor not in made:
        made[factor] = subject.scaled(float(factor))
    if made[factor].noise != made[factor].noise:
        ctx.note(OVERFLOWS.format(factor))
        return None
    return made[factor]


class _Overflow(Exception):
    """With larger matrices there is no room for some text's numbers."""


def compare_futures(specimen: Specimen, ctx: Context, case: Case, subject: Specimen) -> None:
    time = subject.longest(case.time)
    ids = ctx.ids(1, time)
    rows = futures(ids, ctx.other_ids(ids))
    mask = mask_of(case.mask, time, time, ids)
    compared = watched(time, mask, ids.device)

    def hint() -> str:
        known = _hints.setdefault(subject, {})
        key = (case.mask, case.weights)
        if key not in known:
            known[key] = leak_hint(subject, specimen, ctx, case.mask)
        return known[key]

    def call(chosen: list[int]) -> Tensor:
        logits = specimen.logits(rows[chosen], mask=None if mask is None else mask[chosen])
        if specimen is not subject:
            real = logits if mask is None else logits[mask[chosen].bool()]
            if not bool(real.isfinite().all()):
                raise _Overflow
        return logits

    try:
        compare_rows(
            ctx,
            call,
            compared,
            "logits up to t change when only tokens after t change: the model sees the future",
            where=f"mask {case.mask}, weights x{case.weights}",
            hint=hint,
            noise=specimen.noise,
            axes=AXES,
        )
    except _Overflow:  # a later token's infinity times a weight of 0 is no number, and no leak
        ctx.note(OVERFLOWS.format(case.weights))


def compare_rows(
    ctx: Context,
    call: Callable[[list[int]], Tensor],
    compared: Tensor,
    message: str,
    *,
    where: str,
    hint: Callable[[], str],
    noise: float,
    axes: tuple[str, ...],
) -> None:
    """Every row of `call` against the last, in the places `compared` [row, position].

    Where that differs, row by row in batches of one: what rows do to each other is for the family batching to say. It
    can hide a leak, too (a sum over batch and time is the same for all rows), so one row is always looked at alone.
    """
    import torch

    rows, time = compared.shape

    def checked(chosen: list[int]) -> Tensor:
        logits = call(chosen)
        if logits.shape[:2] != (len(chosen), time):
            ctx.fail(
                f"logits are {list(logits.shape)} for {len(chosen)} rows of {time} new tokens",
                where=where,
                hint="every call answers for the tokens it was given, one row of logits each: none for the cached "
                "ones, none for tokens the model adds itself",
            )
        return logits

    change, last = changes(checked, compared, ctx.subject.vocab_size)
    bound = tolerance.allowed(noise, last)
    together, middle = bool((change > bound).any()), rows // 2
    last = checked([rows - 1])
    leaks = bool((largest(checked([middle]), last, compared[middle : middle + 1]) > bound).any())
    if together or leaks:
        change = torch.cat([largest(checked([row]), last, compared[row : row + 1]) for row in range(rows)])
        leaks = bool((change > bound).any())
        if not leaks:
            ctx.note("rows of one batch differ here and each row alone does not: see batching.row_independence")
    expect_numbers(ctx, change, where, padded="mask left" in where or "mask right" in where)
    ctx.equal(
        change,
        torch.zeros_like(change),
        message,
        where=where,
        hint=hint() if leaks else "",
        allowed=bound,
        axes=axes,
    )


def expect_numbers(ctx: Context, change: Tensor, where: str, *, padded: bool) -> None:
    """Violation where logits that are compared are NaN: `change` [row, position] says nothing of the future there."""
    if not bool(change.isnan().any()):
        return
    row, position = change.isnan().nonzero()[0].tolist()
    ctx.fail(
        "logits of tokens that are no padding are NaN, so nothing can be said of what they see",
        where=f"{where}, row {row}, position {position}",
        hint=Hint(
            "a query that sees no key has a softmax of 0 / 0, and 0 * NaN carries it on: see padding.finite",
            "mask.padding_nan",
        )
        if padded
        else "",
    )


def changes(call: Callable[[list[int]], Tensor], compared: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """How far each row's logits lie from the last row's: [row, position], 0 where not `compared`; and the last row's.

    All in one batch where their logits are no more than AT_ONCE numbers; else in several, the last row in each.
    """
    import torch

    rows, time = compared.shape
    count = max(1, AT_ONCE // (time * vocabulary))
    found = []
    for start in range(0, rows, count):
        chosen = list(range(start, min(start + count, rows)))
        logits = call(chosen if chosen[-1] == rows - 1 else [*chosen, rows - 1])
        found.append(largest(logits[: len(chosen)], logits[-1:], compared[chosen]))
    return torch.cat(found), logits[-1]


def largest(logits: Tensor, expected: Tensor, compared: Tensor) -> Tensor:
    """[row, position]: the largest difference over the tokens in float64, 0 where not `compared`.

    A few rows at a time: no other tensor of the logits' size is made. Equal infinities do not differ.
    """
    import torch

    expected = expected.expand_as(logits)
    count = max(1, COMPARED_AT_ONCE // max(1, logits[0].numel()))
    found = []
    for start in range(0, len(logits), count):
        mine, other = (side[start : start + count].double() for side in (logits, expected))
        difference = torch.where(mine == other, 0.0, mine - other).abs().amax(dim=-1)
        found.append(torch.where(compared[start : start + count], difference, 0.0))
    return torch.cat(found)


def known_leak(subject: Specimen) -> str:
    """What causality.no_future_leak has found where plain calls leak too: it is no matter of train mode or chunks."""
    hint = next(iter(_hints.get(subject, {}).values()), "")
    return Hint(f"plain calls leak too: {hint}", *getattr(hint, "suspects", ())) if hint else ""


def layers_of(subject: Specimen) -> int:
    found = structure.blocks(subject.module)
    return len(found[1]) if found is not None else 1


@register_check(
    "causality.train_mode",
    holds="changing the tokens after t leaves the logits up to t alone in train mode too",
    requires=COMPARES_LOGITS,
    space={"time": Span(2, 70), "mask": Choice("none", "ones", "left")},
    grid=({"time": 36, "mask": "none"}, {"time": 20, "mask": "left"}),
)
def check_train_mode(subject: Specimen, ctx: Context) -> None:
    """As no_future_leak, on a copy in train mode with every dropout and jitter set to 0.

    Train mode often has code of its own: another attention kernel, batch statistics, a chunked loss path. Both
    batches are drawn under one seed, so that what randomness is left is the same in both.
    """
    import torch

    copied = without_dropout(subject, lent=True)
    for case in ctx.cases():
        if case.mask != "none" and not subject.can("mask"):
            continue
        time = subject.longest(case.time)
        ids = ctx.ids(1, time)
        mask = mask_of(case.mask, time, time, ids)

        def train(rows: Tensor, mask: Tensor | None = mask, train: bool = True) -> Tensor:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(ctx.seed)
                return copied.logits(rows, mask=mask, train=train)

        rows = futures(ids, ctx.other_ids(ids))
        same = ids.expand(time, time).contiguous()
        expected = train(same)
        logits = train(rows)
        compared = watched(time, mask, ids.device)
        bound = tolerance.allowed(subject.noise, expected[0])
        hint = ""
        if bool((largest(logits, expected, compared) > bound).any()):
            if not torch.equal(train(same).nan_to_num(), expected.nan_to_num()):
                ctx.not_applicable(
                    "train mode is random beyond every dropout and jitter setting: two runs under one seed differ"
                )
            one = None if mask is None else mask[:1]
            expected = train(ids, one).expand_as(expected)
            logits = torch.cat([train(rows[t : t + 1], one) for t in range(time)])
            alike = largest(
                torch.cat([train(rows[t : t + 1], one, train=False) for t in range(time)]),
                train(ids, one, train=False),
                compared,
            )
            hint = (
                train_hint(copied)
                or known_leak(subject)
                or (
                    "eval mode does the same with these tokens and this mask: begin there"
                    if bool((alike > bound).any())
                    else ""
                )
                or (
                    Hint(
                        "the branch for training has another mask (is_causal, or the mask itself, is only set in "
                        "eval), or it mixes over time: statistics over the sequence, a loss chunked the wrong way",
                        "mask.train_only",
                    )
                )
            )
        change = largest(logits, expected, compared)
        expect_numbers(ctx, change, f"mask {case.mask}, train mode", padded=case.mask == "left")
        ctx.equal(
            change,
            torch.zeros_like(change),
            "in train mode, logits up to t change when only tokens after t change",
            where=f"mask {case.mask}",
            hint=hint,
            allowed=bound,
            axes=AXES,
        )


def train_hint(subject: Specimen) -> str:
    """A named suspect: a layer that takes statistics over the batch and time while training."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for name, part in subject.module.named_modules():
        if isinstance(part, _BatchNorm):
            return Hint(
                f"{name} is {type(part).__name__}: in train mode its statistics run over batch and time, so every "
                "position sees all tokens; use LayerNorm or RMSNorm",
                "norm.over_sequence",
                "batch.cross_row",
            )
    return ""


@register_check(
    "causality.cached_chunk",
    holds="inside a chunk fed on top of a cache, changing the tokens after t leaves the logits up to t alone",
    needs=("cache",),
    requires=COMPARES_LOGITS,
    space={"prefix": Span(1, 40), "chunk": Span(2, 40), "mask": Choice("none", "ones", "left")},
    grid=(
        {"prefix": 5, "chunk": 20, "mask": "none"},
        {"prefix": 33, "chunk": 12, "mask": "ones"},
        {"prefix": 9, "chunk": 12, "mask": "left"},
    ),
)
def check_cached_chunk(subject: Specimen, ctx: Context) -> None:
    """A prefix fills the cache, then a chunk of several tokens goes on top, with other tokens after t in row t.

    The causal mask of a chunk is [chunk, prefix + chunk], aligned at its end. torch's is_causal=True aligns it at
    its beginning, and models that skip the mask because "decoding is one token" have none at all.
    """
    for case in ctx.cases():
        if case.mask != "none" and not subject.can("mask"):
            continue
        total = subject.longest(case.prefix + case.chunk)
        prefix = min(case.prefix, total - 2)
        if prefix < 1:
            ctx.not_applicable(f"needs 3 tokens; the context is {total}")
        chunk = total - prefix
        ids = ctx.ids(1, total)
        rows = futures(ids[:, prefix:], ctx.other_ids(ids[:, prefix:]))
        mask = mask_of(case.mask, chunk, total, ids)
        if mask is not None and case.mask == "left" and prefix <= SLACK:
            mask[:] = 1

        before = ids[:, :prefix].expand(chunk, prefix)

        def call(
            chosen: list[int],
            before: Tensor = before,
            rows: Tensor = rows,
            mask: Tensor | None = mask,
        ) -> Tensor:
            over = None if mask is None else mask[chosen]
            time = rows.shape[1]
            begun = subject.forward(
                before[chosen].contiguous(), mask=None if over is None else over[:, :-time], use_cache=True
            )
            if begun.cache is None:
                ctx.not_applicable("use_cache=True gave no cache back for a prefix")
            over = None if over is None else mask_for(subject, over, time)
            return subject.forward(rows[chosen], mask=over, cache=begun.cache, use_cache=True).logits

        compare_rows(
            ctx,
            call,
            watched(chunk, None, ids.device),
            "in a chunk fed on top of a cache, logits up to t change when only tokens after t change",
            where=f"prefix {prefix}, chunk {chunk}, mask {case.mask}",
            hint=lambda: (
                known_leak(subject)
                or Hint(
                    "the causal mask of a chunk on top of a cache is missing or shifted: queries stand at past + i, so "
                    "it is tril(diagonal=past) of [chunk, past + chunk], and it must not be left out because a cache "
                    "is there",
                    "mask.query_offset",
                    "mask.fast_path",
                )
            ),
            noise=subject.noise,
            axes=("chunk tokens changed after position", "seen at chunk position"),
        )
