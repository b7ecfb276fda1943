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

    from lmconform.cases import Case
    from lmconform.context import Context
    from lmconform.specimen import Specimen

NAME, ITEMS = "shift_labels", "num_items_in_batch"


@register_check(
    "loss.shift_labels",
    holds="labels that come shifted already, as shift_labels, are compared with the logits as they stand",
    needs=("labels",),
    profile="smoke",
    requires=("loss.reference",),
    space={
        "beside": Choice("others", "themselves"),
        "batch": Span(1, 3),
        "time": Span(4, 40),
        "train": Choice(False, True),
    },
    grid=(
        {"beside": "others", "batch": 2, "time": 20, "train": False},
        {"beside": "themselves", "batch": 1, "time": 9, "train": False},
        {"beside": "others", "batch": 2, "time": 12, "train": True},
    ),
)
def check_shift_labels(subject: Specimen, ctx: Context) -> None:
    """A float64 cross-entropy of logits[t] and shift_labels[t], a label at the last position included.

    transformers' Trainer passes them beside `labels` where a text is spread over several ranks (context and sequence
    parallelism): a rank that shifts its own part loses the label of its last token. Other labels stand beside them,
    which must not count, or, as DeepSpeed does it, the same once more. With num_items_in_batch the loss is the sum
    divided by it, if it is with labels; a loss that has no use for keywords at all is left alone. Source: transformers
    pull requests 36607 and 48493, issue 48491.
    """
    ignored = ignored_label(subject, ctx)
    if reason := why_not(subject, ctx, ignored):
        ctx.not_applicable(reason)
    heeded = NAME in parameters_of(subject.module)[0]
    for case in ctx.cases():
        ids = ctx.ids(case.batch, subject.longest(case.time))
        given = draw_labels(subject, ctx, ids, "scattered", ignored)
        beside = ids if case.beside == "others" else given
        loss, logits = net_loss(subject, ctx, ids, beside, train=case.train, extra={NAME: given})
        expected = cross_entropy(logits, given, False, ignored)
        allowed = rounding(loss, logits)
        difference = abs(float(loss) - float(expected))
        if not difference <= allowed:
            unheard = float(cross_entropy(logits, beside, subject.convention.labels_shifted, ignored))
            if abs(float(loss) - unheard) <= allowed:
                if not heeded and not _divided(subject, ctx, ids, ignored, case):
                    ctx.not_applicable("forward() takes **kwargs and has no use for them in its loss")
                hint, what = _ignored_hint(), ": they are taken and ignored"
            else:
                hint, what = explain(subject, loss, logits, given, ignored, 4 * allowed, shifted=False)
            ctx.within(
                difference if difference == difference else float("inf"),
                allowed,
                f"loss differs from the float64 cross-entropy of the model's own logits with {NAME}{what}",
                where=f"loss {float(loss):.6g}, expected {float(expected):.6g} (labels beside them: {case.beside}, "
                f"{'train' if case.train else 'eval'} mode)",
                hint=hint,
            )
        ctx.within(difference, allowed, f"loss differs from the float64 cross-entropy with {NAME}")
        heeded = True
        _compare_divided(subject, ctx, ids, beside, given, ignored, case)


def why_not(subject: Specimen, ctx: Context, ignored: int) -> str:
    """Why the check does not apply: shift_labels are not taken, are a switch, or are refused. "" where it does.

    A switch is one by what it does: True and False are both taken, and do not give the same. Raises what the model
    raises where it takes them by name and breaks on them; a ValueError or NotImplementedError refuses.
    """
    named, _, open_keywords = parameters_of(subject.module)
    if NAME not in named and not open_keywords:
        return f"{type(subject.module).__name__}.forward() takes no {NAME}"
    ids = ctx.ids(2, subject.longest(9))
    if _is_switch(subject, ctx, ids):
        return f"{NAME} is a switch here: True and False are taken, and do not give the same loss"
    try:
        net_loss(subject, ctx, ids, ids, extra={NAME: draw_labels(subject, ctx, ids, "scattered", ignored)})
    except (Violation, Unavailable):
        raise
    except Exception as error:  # the same call without them is right: loss.reference
        if NAME in named and not isinstance(error, ValueError | NotImplementedError):
            raise
        return f"{NAME} is refused: {type(error).__name__}: {first_line(error)}"
    return ""


def _is_switch(subject: Specimen, ctx: Context, ids: Tensor) -> bool:
    losses: list[float | None] = []
    for value in (True, False):
        try:
            loss, logits = net_loss(subject, ctx, ids, ids, extra={NAME: value})
            losses.append(float(loss))
        except Violation:  # no loss came back
            losses.append(None)
        except Exception:  # not taken
            return False
    one, other = losses
    if one is None or other is None:
        return one is not other
    return abs(one - other) > rounding(loss, logits)


def _ignored_hint() -> str:
    return Hint(
        f"hand **kwargs on: self.loss_function(logits, labels, vocab_size, **kwargs), and let the loss take {NAME} "
        "where they are given; Trainer passes them in context and sequence parallelism, and a rank that shifts its "
        "own part of the labels leaves out its last token's",
        "loss.shift_labels_ignored",
    )


def _divided(subject: Specimen, ctx: Context, ids: Tensor, ignored: int, case: Case) -> bool:
    """Whether the loss of plain labels is their sum divided by num_items_in_batch, as Trainer has it."""
    items = 3 * ids.numel()
    try:
        loss, logits = net_loss(subject, ctx, ids, ids, train=case.train, extra={ITEMS: items})
    except Exception:  # refused
        return False
    shifted = subject.convention.labels_shifted
    return abs(float(loss) - _by_items(logits, ids, shifted, ignored, items)) <= rounding(loss, logits)


def _by_items(logits: Tensor, labels: Tensor, shifted: bool, ignored: int, items: int) -> float:
    scores, wanted = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    return float(token_losses(scores, wanted, ignored)[0].sum()) / items


def _compare_divided(
    subject: Specimen, ctx: Context, ids: Tensor, beside: Tensor, given: Tensor, ignored: int, case: Case
) -> None:
    """With num_items_in_batch the sum is divided by it; where not even that of labels is, loss.accumulation says so."""
    if not _divided(subject, ctx, ids, ignored, case):
        return
    items = 3 * ids.numel()
    try:
        loss, logits = net_loss(subject, ctx, ids, beside, train=case.train, extra={NAME: given, ITEMS: items})
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
