"""padding: a row's padding changes nothing about its real tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmconform import structure, tolerance
from lmconform.cases import Choice, Span
from lmconform.context import Hint
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

OF_NEW_TOKENS = ("cache_params", "state", "mems")  # no mask reaches a recurrent state or XLNet's memories any more
FILL = Choice("pad", "random")


def lengths_of(time: int, pads: int) -> list[int]:
    """Row lengths from `time` (no padding) down to `time - pads`: none, one, some and all the padding."""
    return [time - pads * part // 4 if part != 1 else time - min(1, pads) for part in range(5)]


def real_places(lengths: list[int], time: int, side: str, like: Tensor) -> Tensor:
    """The mask [rows, time], 1 at real tokens, padding on that side."""
    import torch

    steps = torch.arange(time, device=like.device)
    sizes = torch.tensor(lengths, device=like.device)[:, None]
    return (steps >= time - sizes if side == "left" else steps < sizes).to(torch.int64)


def positions_from(subject: Specimen, mask: Tensor) -> Tensor:
    """position_ids that do not count padding, from the model's own first one (0; behind its padding row in RoBERTa)."""
    return subject.first_position + (mask.cumsum(-1) - 1).clamp(min=0)


def pad_id(subject: Specimen) -> int | None:
    """The stated padding token, None where none is stated or it is no token of the vocabulary."""
    found = structure.special_ids(subject.module).get("pad_token_id")
    return found if found is not None and found < subject.vocab_size else None


def padded(subject: Specimen, ids: Tensor, mask: Tensor, fill: str) -> Tensor:
    """`ids` with the places under padding overwritten by the padding token (fill pad), else left as they are."""
    token = pad_id(subject)
    return ids.masked_fill(mask == 0, token) if fill == "pad" and token is not None else ids


def alone(subject: Specimen, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of each row without its padding, scattered back to where its tokens stand: [rows, time, vocab].

    Rows of one length share a call; no mask and no positions are passed.
    """
    scattered: Tensor | None = None
    real = mask.bool()
    sizes = real.sum(-1).tolist()
    for size in sorted(set(sizes)):
        rows = [row for row, other in enumerate(sizes) if other == size]
        logits = subject.logits(ids[rows][real[rows]].view(len(rows), size))
        if scattered is None:
            scattered = logits.new_zeros(*ids.shape, logits.shape[-1])
        for index, row in enumerate(rows):
            scattered[row, real[row]] = logits[index]
    assert scattered is not None
    return scattered


def check_padded(subject: Specimen, ctx: Context, side: str, *, give_positions: bool, message: str) -> None:
    """Rows of mixed length, padded into one batch, against each row alone; every real token of every row."""
    import torch

    positioned = give_positions and subject.convention.positions is not None
    for case in ctx.cases():
        time = subject.longest(case.time)
        ids = ctx.ids(5, time)
        mask = real_places(lengths_of(time, min(case.pads, time - 1)), time, side, ids)
        inputs: dict[str, Any] = {"mask": mask}
        if positioned:
            inputs["positions"] = positions_from(subject, mask)
        given = padded(subject, ids, mask, case.get("fill", "pad"))
        together = subject.logits(given, **inputs)
        expected = alone(subject, ids, mask)
        real = mask.bool()[..., None]
        actual = torch.where(real, together, expected)
        hint = ""
        bound = tolerance.allowed(subject.noise, expected)
        if not bool(((actual - expected).abs() <= bound).all()):
            singly = torch.cat(
                [
                    subject.logits(given[row : row + 1], **{key: value[row : row + 1] for key, value in inputs.items()})
                    for row in range(len(ids))
                ]
            )
            if bool(((singly - expected).abs() <= bound)[mask.bool()].all()):
                hint = Hint(
                    "each padded row alone is right, so rows disturb each other: one row's mask, length or positions "
                    "serve all (see batching.row_independence)",
                    "batch.cross_row",
                    "mask.fast_path",
                    "position.shared_row",
                )
            else:
                hint = padding_hint(subject, ids, ctx.other_ids(ids), inputs, side, bound)
        ctx.equal(
            actual,
            expected,
            message,
            where=f"{side} padding of 0 to {int((mask == 0).sum(-1).max())} in {time} columns",
            hint=hint,
        )


def padding_hint(
    subject: Specimen, ids: Tensor, others: Tensor, inputs: dict[str, Any], side: str, bound: float
) -> str:
    """Tells padding that is attended to from positions that count it: by exchanging the tokens under the padding."""
    import torch

    real, positioned = inputs["mask"].bool(), "positions" in inputs
    one = subject.logits(ids, **inputs)
    other = subject.logits(torch.where(real, ids, others), **inputs)
    change = (one - other)[real]
    if bool(change.isnan().any()):
        return Hint(
            "softmax over a row that is masked everywhere gives NaN, and NaN spreads from padding to real tokens",
            "mask.padding_nan",
        )
    if float(change.abs().max()) > bound:
        return Hint(
            "real tokens look at padding: their logits change with the tokens under it. attention_mask is ignored, "
            "inverted, or lost when it is merged with the causal mask (or one branch, layer or head skips it)",
            "mask.padding_ignored",
            "mask.inverted",
            "mask.fast_path",
        )
    if positioned:
        whole = torch.arange(ids.shape[1], device=ids.device)[None] + subject.first_position
        given = subject.logits(ids, positions=whole.expand_as(ids))
        if float((given - subject.logits(ids)).abs().max()) > bound:
            return Hint(
                "position_ids that are given are not taken as the default ones are, with or without padding: see "
                "positions.defaults",
                "position.offset",
                "position.ignores_mask",
            )
    if side == "right":
        return Hint(
            "what stands under the padding plays no part, how much of it there is does: look for a division by the "
            "padded length, a softmax or mean that counts masked places, or positions that start at the padding",
            "position.ignores_mask",
            "attention.unscaled",
        )
    if not positioned and subject.convention.positions is not None:
        return Hint(
            "position_ids were left out, and the default counts padding: in forward(), derive it from "
            "attention_mask.cumsum(-1) - 1, or always pass position_ids with left padding",
            "position.ignores_mask",
        )
    if positioned:
        return Hint(
            "padding is masked, but positions count it although position_ids were passed: look for code that uses "
            "torch.arange(time), or a bias by column, in place of position_ids; or padding is set to zero in place of "
            "being masked, and still takes its share of the softmax",
            "position.ignores_mask",
        )
    return Hint(
        "padding is masked, but positions count it: derive them from attention_mask.cumsum(-1) - 1 instead of "
        "torch.arange(time)",
        "position.ignores_mask",
    )


@register_check(
    "padding.left",
    holds="left-padded rows equal unpadded ones at every real token, with position_ids derived from the mask",
    needs=("mask",),
    profile="smoke",
    requires=COMPARES_LOGITS,
    space={"time": Span(1, 70), "pads": Span(0, 69), "fill": FILL},
    grid=(
        {"time": 20, "pads": 17, "fill": "pad"},
        {"time": 20, "pads": 19, "fill": "random"},
        {"time": 70, "pads": 40, "fill": "pad"},
    ),
)
def check_left(subject: Specimen, ctx: Context) -> None:
    """Five rows with no, one, some, many and the most pads in one batch, against each row alone.

    Every real token of every row is compared. The places under the padding hold the padding token, then random
    tokens: what is masked must not matter.
    """
    check_padded(
        subject, ctx, "left", give_positions=True,
        message="logits of a left-padded row differ from the same row alone",
    )  # fmt: skip


@register_check(
    "padding.right",
    holds="right-padded rows equal unpadded ones at every real token",
    needs=("mask",),
    profile="smoke",
    requires=COMPARES_LOGITS,
    space={"time": Span(1, 70), "pads": Span(0, 69), "fill": FILL},
    grid=(
        {"time": 20, "pads": 19, "fill": "random"},
        {"time": 70, "pads": 40, "fill": "pad"},
    ),
)
def check_right(subject: Specimen, ctx: Context) -> None:
    """The same with padding at the end, as in training batches."""
    check_padded(
        subject, ctx, "right", give_positions=True,
        message="logits of a right-padded row differ from the same row alone",
    )  # fmt: skip


@register_check(
    "padding.left_defaults",
    holds="left-padded rows equal unpadded ones when only attention_mask is passed, no position_ids",
    needs=("mask", "pos"),
    severity="warning",
    requires=("padding.left",),
    space={"time": Span(1, 70), "pads": Span(0, 69)},
    grid=({"time": 20, "pads": 17}, {"time": 70, "pads": 40}),
)
def check_left_defaults(subject: Specimen, ctx: Context) -> None:
    """As padding.left without position_ids: a trap where positions are absolute and their default counts padding.

    Documented in transformers: GPT-2 "position_ids ... should be passed when padding on the left".
    """
    if subject.convention.positions in dict(subject.convention.filled):
        ctx.not_applicable(f"forward() requires {subject.convention.positions}: it has no default")
    check_padded(
        subject, ctx, "left", give_positions=False,
        message="without position_ids, logits of a left-padded row differ from the same row alone",
    )  # fmt: skip


@register_check(
    "padding.finite",
    holds="no NaN or infinity in logits or gradients with rows of very different length",
    needs=("mask",),
    requires=("contract.shape", "contract.finite"),
    space={"time": Span(1, 70), "side": Choice("left", "right")},
    grid=({"time": 40, "side": "left"}, {"time": 40, "side": "right"}),
)
def check_finite(subject: Specimen, ctx: Context) -> None:
    """Rows of 1 to 40 tokens in one batch; every logit, those under the padding too, and every weight's gradient.

    A query under left padding sees nothing at all, so its softmax is over an empty row. That NaN may be hidden
    (nan_to_num, a masked loss) and come back in the backward pass, where 0 * NaN is NaN.
    """
    import torch

    for case in ctx.cases():
        time = subject.longest(case.time)
        ids = ctx.ids(5, time)
        mask = real_places(lengths_of(time, time - 1), time, case.side, ids)
        inputs: dict[str, Any] = {"mask": mask}
        if subject.convention.positions is not None:
            inputs["positions"] = positions_from(subject, mask)
        logits = subject.logits(padded(subject, ids, mask, "pad"), grad=True, **inputs)
        bad = ~logits.isfinite()
        hint = Hint(
            "softmax over a row that is masked everywhere: let a fully masked query see itself, or use "
            "torch.finfo(dtype).min instead of -inf",
            "mask.padding_nan",
        )
        if bool(bad.any()):
            row, position, token = bad.nonzero()[0].tolist()
            under = "a real token" if bool(mask[row, position]) else "padding"
            ctx.fail(
                f"{int(bad.sum())} of {bad.numel()} logits are NaN or infinite in a batch padded on the {case.side}",
                where=f"row {row}, position {position} ({under}), token {token}",
                hint=hint,
            )
        if not logits.requires_grad:
            ctx.note("gradients not tried: logits carry none")
            continue
        real = logits[mask.bool()]
        loss = torch.nn.functional.cross_entropy(real, ids[mask.bool()])
        named = [(name, weight) for name, weight in subject.module.named_parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(loss, [weight for _, weight in named], allow_unused=True)
        broken = [
            name
            for (name, _), gradient in zip(named, gradients, strict=True)
            if gradient is not None and not bool(gradient.isfinite().all())
        ]
        if broken:
            ctx.fail(
                f"the logits are finite, but {len(broken)} of {len(named)} gradients hold NaN or infinity in a batch "
                f"padded on the {case.side}",
                where=f"first {broken[0]}",
                hint=Hint(
                    f"{hint}; nan_to_num() or torch.where() after the softmax hides it forward and not backward",
                    "mask.padding_nan",
                ),
            )


@register_check(
    "padding.cached",
    holds="left-padded cached decoding equals unpadded decoding",
    needs=("mask", "cache"),
    requires=COMPARES_LOGITS,
    space={"time": Span(1, 64), "pads": Span(0, 63), "steps": Span(1, 6)},
    grid=({"time": 12, "pads": 10, "steps": 5}, {"time": 40, "pads": 25, "steps": 3}),
)
def check_cached(subject: Specimen, ctx: Context) -> None:
    """A left-padded prefill and a few single tokens on its cache, against each row's tokens in one plain forward.

    Where that differs, each row is decoded unpadded too: what is wrong with the cache alone is for the family cache
    to say. position_ids go on from each row's own length.
    """
    import torch

    for case in ctx.cases():
        total = subject.longest(case.time + case.steps)
        time = total - min(case.steps, total - 1)
        ids = ctx.ids(5, total)
        mask = real_places(lengths_of(total, min(case.pads, time - 1)), total, "left", ids)
        actual = decode(subject, ctx, padded(subject, ids, mask, "pad"), mask, time)
        expected = alone(subject, ids, mask)
        real = mask.bool()[..., None]
        actual = torch.where(real, actual, expected)
        if not bool(((actual - expected).abs() <= tolerance.allowed(subject.noise, expected)).all()):
            plain = expected.clone()
            for row, length in enumerate(mask.sum(-1).tolist()):
                own = ids[row : row + 1, total - length :]
                plain[row, total - length :] = decode(subject, ctx, own, None, time - (total - length))[0]
            if not bool(((plain - expected).abs() <= tolerance.allowed(subject.noise, expected)).all()):
                ctx.note("cached decoding differs from one forward without padding too: see cache.decode")
            expected = plain
        ctx.equal(
            actual,
            expected,
            "logits of left-padded decoding with a cache differ from the same row decoded alone",
            where=f"prefill of {time} columns, then {total - time} more, one by one",
            hint=Hint(
                "prefill or decoding goes wrong under padding: in a decoding step, keys under the padding must stay "
                "masked (the mask covers past + 1 columns) and the position is the number of real tokens, not the "
                "length of the cache",
                "mask.padding_ignored",
                "position.ignores_mask",
                "position.restarts_on_decode",
            ),
        )


def decode(subject: Specimen, ctx: Context, ids: Tensor, mask: Tensor | None, prefill: int) -> Tensor:
    """Logits [rows, time, vocab] of `prefill` columns at once and then of single tokens on the cache."""
    import torch

    positions = None if mask is None or subject.convention.positions is None else positions_from(subject, mask)
    parts, cache, start = [], None, 0
    for end in [*([prefill] if prefill else []), *range(prefill + 1, ids.shape[1] + 1)]:
        output = subject.forward(
            ids[:, start:end],
            mask=None if mask is None else mask_for(subject, mask[:, :end], end - start),
            positions=None if positions is None else positions[:, start:end],
            cache=cache,
            use_cache=True,
        )
        if output.logits.shape[:2] != (len(ids), end - start):
            ctx.fail(
                f"a call on {len(ids)} rows and {end - start} new tokens {'with' if cache is not None else 'without'} "
                f"a cache gives logits of shape {list(output.logits.shape)}",
                hint=Hint(
                    "a state or cache without its time axis is broadcast against the rows of the batch",
                    "contract.shape_wrong",
                    "batch.cross_row",
                ),
            )
        parts.append(output.logits)
        cache, start = output.cache, end
    return torch.cat(parts, dim=1)


def mask_for(subject: Specimen, mask: Tensor, time: int) -> Tensor:
    """The mask as the model takes it: over past and new tokens, over the new ones alone beside a state or memories."""
    return mask[:, -time:] if subject.convention.cache in OF_NEW_TOKENS else mask
