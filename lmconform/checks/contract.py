"""contract: what every causal language model's forward() promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform.cases import Choice, Span
from lmconform.registry import register_check

if TYPE_CHECKING:
    from lmconform.context import Context
    from lmconform.specimen import Specimen


@register_check(
    "contract.shape",
    holds="logits are [batch, time, vocab], floating, for time 1 and up",
    profile="smoke",
    requires=(),
    space={"batch": Span(1, 4), "time": Span(1, 40)},
    grid=({"batch": 1, "time": 1}, {"batch": 3, "time": 1}, {"batch": 1, "time": 7}, {"batch": 3, "time": 40}),
)
def check_shape(subject: Specimen, ctx: Context) -> None:
    """Batch 1 and 3, time 1 to 40: a squeezed dimension shows at size 1."""
    for case in ctx.cases():
        ids = ctx.ids(case.batch, subject.longest(case.time))
        logits = subject.logits(ids)
        expected = [*ids.shape, subject.vocab_size]
        if list(logits.shape) != expected:
            ctx.fail(
                f"logits are {list(logits.shape)}, expected [batch, time, vocab] = {expected}",
                hint="a squeeze() or a view that drops a dimension of size 1",
            )
        if not logits.is_floating_point():
            ctx.fail(f"logits are {logits.dtype}, expected a floating type")


@register_check(
    "contract.finite",
    holds="no NaN or infinity, for usual, long and extreme-but-legal input",
    profile="smoke",
    space={"kind": Choice("usual", "same_token", "first_id", "last_id", "long"), "time": Span(1, 128)},
    grid=(
        {"kind": "usual", "time": 20},
        {"kind": "same_token", "time": 40},
        {"kind": "first_id", "time": 3},
        {"kind": "last_id", "time": 3},
        {"kind": "long", "time": 128},
    ),
)
def check_finite(subject: Specimen, ctx: Context) -> None:
    """Usual text, one token over and over, the first and the last id of the vocabulary, the whole context."""
    for case in ctx.cases():
        ids = ctx.ids(2, subject.longest(case.time))
        if case.kind == "same_token":
            ids = ids[:1, :1].expand_as(ids).contiguous()
        elif case.kind == "first_id":
            ids = ids.clone().fill_(0)
        elif case.kind == "last_id":
            ids = ids.clone().fill_(subject.vocab_size - 1)
        logits = subject.logits(ids)
        bad = ~logits.isfinite()
        if bool(bad.any()):
            row, position, token = bad.nonzero()[0].tolist()
            ctx.fail(
                f"{int(bad.sum())} of {bad.numel()} logits are NaN or infinite on {case.kind} input",
                where=f"row {row}, position {position}, token {token}",
                hint="a division by zero, a softmax over a fully masked row, or an overflow",
            )
