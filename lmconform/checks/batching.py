"""batching: the rows of a batch have nothing to do with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform.cases import Choice, Span
from lmconform.context import Hint
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen


def ragged(ids: Tensor, side: str) -> Tensor | None:
    """A mask like `ids` in which every row has another length, the first the full one; None for side none."""
    import torch

    if side == "none":
        return None
    rows, time = ids.shape
    lengths = torch.tensor([max(1, time - (row * (time - 1)) // max(1, rows - 1)) for row in range(rows)])
    steps = torch.arange(time)
    real = steps[None] < lengths[:, None] if side == "right" else steps[None] >= time - lengths[:, None]
    return real.to(ids)


def at_real(logits: Tensor, expected: Tensor, mask: Tensor | None) -> Tensor:
    """`logits` where the token is real, `expected` under padding: what a model says there is its own affair."""
    import torch

    return logits if mask is None else torch.where(mask[..., None].bool(), logits, expected)


@register_check(
    "batching.row_independence",
    holds="a row's logits do not depend on the other rows: neither on their tokens nor on their lengths or number",
    profile="smoke",
    requires=COMPARES_LOGITS,
    space={
        "rows": Span(2, 5), "time": Span(1, 40), "mask": Choice("none", "left", "right"),
        "company": Choice("alone", "others"),
    },
    grid=(
        {"rows": 3, "time": 36, "mask": "none", "company": "alone"},
        {"rows": 3, "time": 20, "mask": "left", "company": "alone"},
        {"rows": 3, "time": 20, "mask": "right", "company": "alone"},
        {"rows": 3, "time": 20, "mask": "none", "company": "others"},
        {"rows": 3, "time": 20, "mask": "left", "company": "others"},
        {"rows": 3, "time": 20, "mask": "right", "company": "others"},
    ),
)  # fmt: skip
def check_row_independence(subject: Specimen, ctx: Context) -> None:
    """Every row of a batch, once alone and once beside rows with other tokens and other lengths.

    Its own tokens and its own padding stay as they are, so nothing but the company changes. Rows have unlike
    lengths: code that takes the first row's, the longest row's or the sum of all lengths for everyone shows.
    """
    import torch

    for case in ctx.cases():
        if case.mask != "none" and not subject.can("mask"):
            continue
        ids = ctx.ids(case.rows, subject.longest(case.time))
        mask = ragged(ids, case.mask)
        together = subject.logits(ids, mask=mask)
        if case.company == "alone":
            apart = torch.cat(
                [
                    subject.logits(ids[row : row + 1], mask=None if mask is None else mask[row : row + 1])
                    for row in range(case.rows)
                ]
            )
            message = "logits of a row in a batch differ from the same row alone"
        else:
            strangers = ctx.other_ids(ids)
            lengths = None if mask is None else mask.roll(1, dims=0)
            kept = []
            for row in range(case.rows):
                company, company_mask = strangers.clone(), None if lengths is None else lengths.clone()
                company[row] = ids[row]
                if company_mask is not None and mask is not None:
                    company_mask[row] = mask[row]
                kept.append(subject.logits(company, mask=company_mask)[row])
            apart = torch.stack(kept)
            message = "logits of a row change when only the other rows change"
        ctx.equal(
            at_real(together, apart, mask),
            apart,
            message,
            where=f"{case.rows} rows, mask {case.mask}",
            hint=cross_row_hint(case.mask),
        )


def cross_row_hint(mask: str) -> str:
    if mask == "none":
        return Hint(
            "something mixes rows: a mean or norm over dimension 0, BatchNorm, a view or reshape that moves batch into "
            "heads or time ([batch, time] taken for [time, batch]), or a buffer sized for one row",
            "batch.cross_row",
        )
    return Hint(
        "if rows without padding pass, one row's mask serves all: look for mask[0], mask.any(0), lengths.max() or "
        "mask.sum() where each row's own is meant, and for positions computed from the first row",
        "batch.cross_row",
        "position.shared_row",
    )


@register_check(
    "batching.permutation",
    holds="permuting the rows of a batch permutes its logits",
    profile="smoke",
    requires=COMPARES_LOGITS,
    space={"rows": Span(2, 5), "time": Span(1, 40), "mask": Choice("none", "left", "right")},
    grid=(
        {"rows": 4, "time": 36, "mask": "none"},
        {"rows": 4, "time": 20, "mask": "left"},
        {"rows": 4, "time": 20, "mask": "right"},
    ),
)
def check_permutation(subject: Specimen, ctx: Context) -> None:
    """The same batch with its rows moved round by one, so that every row, the longest too, has another place."""
    for case in ctx.cases():
        if case.mask != "none" and not subject.can("mask"):
            continue
        ids = ctx.ids(case.rows, subject.longest(case.time))
        mask = ragged(ids, case.mask)
        expected = subject.logits(ids, mask=mask)
        moved = subject.logits(ids.roll(1, dims=0), mask=None if mask is None else mask.roll(1, dims=0))
        ctx.equal(
            at_real(moved.roll(-1, dims=0), expected, mask),
            expected,
            "logits of a row depend on where in the batch it stands",
            where=f"{case.rows} rows, mask {case.mask}",
            hint=Hint(
                "one row is treated apart: an index [0] or [-1] into the batch, a state or mask of the first row "
                "used for all, or rows summed up along the batch",
                "batch.cross_row",
                "position.shared_row",
            ),
        )
