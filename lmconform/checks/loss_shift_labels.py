"""loss: labels that come shifted already (`shift_labels`) are compared with the logits as they stand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform.cases import Choice, Span
from lmconform.checks.cross_entropy import cross_entropy, explain, rounding, token_losses
from lmconform.checks.loss import draw_labels, ignored_label, net_loss
from lmconform.context import Hint, Violation
from lmconform.conventions import first_line, parameters_of
from lmconform.registry import register_check
from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

NAME, ITEMS = "shift_labels", "num_items_in_batch"


@register_check(
    "loss.shift_labels",
    holds="labels that come shifted already, as shift_labels, are compared with the logits as they stand",
    needs=("labels",),
    profile="smoke",
    requires=("loss.reference",),
    space={"beside": Choice("others", "themselves"), "batch": Span(1, 3), "time": Span(4, 40)},
    grid=({"beside": "others", "batch": 2, "time": 20}, {"beside": "themselves", "batch": 1, "time": 9}),
)
def check_shift_labels(subject: Specimen, ctx: Context) -> None:
    """A float64 cross-entropy of logits[t] and shift_labels[t], a label at the last position included.

    transformers' Trainer passes them beside `labels` where a text is spread over several ranks (context and sequence
    parallelism): a rank that shifts its own part loses the label of its last token. Other labels stand beside them,
    which must not count, or, as DeepSpeed does it, the same once more. With num_items_in_batch the loss is the sum
    divided by it, if it is with labels; a loss that has no use for keywords at all is left alone. Source: transformers
    pull requests 36607 and 48493, issue 48491.
    """
    named, _, open_keywords = parameters_of(subject.module)
    if NAME not in named and not open_keywords:
        ctx.not_applicable(f"{type(subject.module).__name__}.forward() takes no {NAME}")
    if NAME in named and (isinstance(named[NAME].default, bool) or "bool" in str(named[NAME].annotation)):
        ctx.not_applicable(f"{NAME} is a switch here, {named[NAME].default} by default")
    ignored = ignored_label(subject, ctx)
    for case in ctx.cases():
        ids = ctx.ids(case.batch, subject.longest(case.time))
        given = draw_labels(subject, ctx, ids, "scattered", ignored)
        beside = ids if case.beside == "others" else given
        try:
            loss, logits = net_loss(subject, ctx, ids, beside, extra={NAME: given})
        except (Violation, Unavailable):
            raise
        except Exception as error:  # the same call without them is right: loss.reference
            switch = "Boolean value of Tensor" in str(error)
            if NAME in named and not switch and not isinstance(error, ValueError | NotImplementedError):
                raise
            ctx.not_applicable(f"{NAME} is refused: {type(error).__name__}: {first_line(error)}")
            return
        expected = cross_entropy(logits, given, False, ignored)
        allowed = rounding(loss, logits)
        difference = abs(float(loss) - float(expected))
        if not difference <= allowed:
            unheard = float(cross_entropy(logits, beside, subject.convention.labels_shifted, ignored))
            if abs(float(loss) - unheard) <= allowed:
                if NAME not in named and not _divided_by_items(subject, ctx, ids, ignored):
                    ctx.not_applicable("forward() takes **kwargs and has no use for them in its loss")
                hint, what = _ignored_hint(), ": they are taken and ignored"
            else:
                hint, what = explain(subject, loss, logits, given, ignored, 4 * allowed, shifted=False)
            ctx.within(
                difference if difference == difference else float("inf"),
                allowed,
                f"loss differs from the float64 cross-entropy of the model's own logits with {NAME}{what}",
                where=f"loss {float(loss):.6g}, expected {float(expected):.6g} (labels beside them: {case.beside})",
                hint=hint,
            )
        ctx.within(difference, allowed, f"loss differs from the float64 cross-entropy with {NAME}")
        _compare_divided(subject, ctx, ids, beside, given, ignored)


def _ignored_hint() -> str:
    return Hint(
        f"hand **kwargs on: self.loss_function(logits, labels, vocab_size, **kwargs), and let the loss take {NAME} "
        "where they are given; Trainer passes them in context and sequence parallelism, and a rank that shifts its "
        "own part of the labels leaves out its last token's",
        "loss.shift_labels_ignored",
    )


def _divided_by_items(subject: Specimen, ctx: Context, ids: Tensor, ignored: int) -> bool:
    """Whether the loss of plain labels is their sum divided by num_items_in_batch, as Trainer has it."""
    items = 3 * ids.numel()
    try:
        loss, logits = net_loss(subject, ctx, ids, ids, extra={ITEMS: items})
    except Exception:  # refused
        return False
    shifted = subject.convention.labels_shifted
    return abs(float(loss) - _by_items(logits, ids, shifted, ignored, items)) <= rounding(loss, logits)


def _by_items(logits: Tensor, labels: Tensor, shifted: bool, ignored: int, items: int) -> float:
    scores, wanted = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    return float(token_losses(scores, wanted, ignored)[0].sum()) / items


def _compare_divided(subject: Specimen, ctx: Context, ids: Tensor, beside: Tensor, given: Tensor, ignored: int) -> None:
    """With num_items_in_batch the sum is divided by it; where not even that of labels is, loss.accumulation says so."""
    if not _divided_by_items(subject, ctx, ids, ignored):
        return
    items = 3 * ids.numel()
    try:
        loss, logits = net_loss(subject, ctx, ids, beside, extra={NAME: given, ITEMS: items})
    except (TypeError, ValueError, NotImplementedError):  # either, not both
        return
    expected = _by_items(logits, given, False, ignored, items)
    ctx.within(
        abs(float(loss) - expected),
        rounding(loss, logits),
        f"with {NAME} and {ITEMS} the loss is not the sum over {NAME} divided by that number",
        where=f"loss {float(loss):.6g}, expected {expected:.6g}",
        hint=Hint(
            "the branch for labels that are shifted already divides by a count of its own: divide the sum by "
            f"{ITEMS} there too",
            "loss.accumulation_wrong",
            "loss.normalisation",
        ),
    )
