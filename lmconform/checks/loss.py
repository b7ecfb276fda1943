"""loss: the loss that forward() computes from labels is the cross-entropy of the next token, shifted once."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from lmconform import structure, tolerance
from lmconform.cases import Choice, Span
from lmconform.checks.cross_entropy import IGNORED, cross_entropy, explain, rounding
from lmconform.context import Hint
from lmconform.conventions import first_line, parameters_of
from lmconform.measuring.buffers import buffers_kept
from lmconform.registry import register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

REQUIRES = ("contract.shape", "contract.finite")
COEFFICIENTS = ("{}_coef", "router_{}_coef", "router_{}_coefficient", "{}_coefficient", "{}_weight")  # of an aux_loss
UNSTATED = (
    "if train mode is to add a term (further tokens predicted, experts balanced), return it under its own name and "
    "state its coefficient (aux_loss and aux_loss_coef), so that the loss can be told from it; else take it out"
)


@register_check(
    "loss.reference",
    holds="loss equals an independent float64 cross-entropy, shifted once, with -100 scattered and with one label; "
    "with none: NaN or 0, nothing else",
    needs=("labels",),
    profile="smoke",
    requires=REQUIRES,
    space={
        "labels": Choice("all", "special", "scattered", "one", "none"),
        "batch": Span(1, 4),
        "time": Span(4, 40),
        "train": Choice(False, True),
    },
    grid=(
        {"labels": "all", "batch": 3, "time": 20, "train": False},
        {"labels": "all", "batch": 1, "time": 4, "train": False},
        {"labels": "special", "batch": 2, "time": 20, "train": False},
        {"labels": "scattered", "batch": 3, "time": 40, "train": False},
        {"labels": "one", "batch": 2, "time": 9, "train": False},
        {"labels": "none", "batch": 2, "time": 9, "train": False},
        {"labels": "scattered", "batch": 3, "time": 20, "train": True},
    ),
)
def check_reference(subject: Specimen, ctx: Context) -> None:
    """The reference is computed in float64 from the logits of the very same call, so no rounding of the model counts.

    Labels are drawn apart from the inputs, so that ids taken for labels show. What train mode adds beside the logits (a
    head for further tokens, the balance of experts) is noted: towards the logits the loss must be the cross-entropy
    alone. Source: transformers' issue 34242 and the many reports of a loss shifted twice or not at all.
    """
    ignored = ignored_label(subject, ctx)
    for case in ctx.cases():
        ids = ctx.ids(case.batch, subject.longest(case.time))
        labels = draw_labels(subject, ctx, ids, case.labels, ignored)
        with buffers_kept(subject.module):
            # with no label at all a term of train mode's own may be left, and rightly
            loss, logits = net_loss(subject, ctx, ids, labels, train=case.train and case.labels != "none")
        if case.labels == "none":
            value = float(loss.detach())
            if value == value and value != 0:
                ctx.fail(
                    f"loss is {value:.4g} although every label is {ignored}; expected NaN or 0",
                    hint=Hint(
                        "the sum over no label at all is divided by something else than the number of labels, or "
                        "ignored labels are clamped to a token and counted",
                        "loss.normalisation",
                        "loss.ignore_index",
                    ),
                )
            continue
        expected = cross_entropy(logits, labels, subject.convention.labels_shifted, ignored)
        difference = abs(float(loss.detach().double()) - float(expected.detach()))
        allowed = rounding(loss, logits)
        if not difference <= allowed:
            loss = loss.detach()
            hint, what = explain(subject, loss, logits, labels, ignored, 4 * allowed)
            added = (
                added_in_training(subject, ctx, ids, labels, ignored)
                if case.train and difference < math.inf and not what
                else None
            )
            if added is not None and added.beside_logits:
                ctx.note(
                    f"in train mode the loss holds another term ({added.value:.3g} here), which does not come from the "
                    "logits: towards them it is the cross-entropy alone"
                )
                continue
            if added is not None:
                what = f": in eval mode it is right, in train mode {added.value:.3g} is added to it"
                hint = hint if added.beside_logits is False else UNSTATED
            ctx.within(
                difference if difference == difference else float("inf"),
                allowed,
                f"loss differs from the float64 cross-entropy of the model's own logits{what}",
                where=f"loss {float(loss):.6g}, expected {float(expected):.6g} (labels: {case.labels}, "
                f"{'train' if case.train else 'eval'} mode)",
                hint=hint,
            )
        ctx.within(difference, allowed, "loss differs from the float64 cross-entropy", where=f"labels: {case.labels}")


@register_check(
    "loss.gradient",
    holds="the loss's gradient with respect to the logits equals the reference's, also weighted",
    needs=("labels",),
    profile="smoke",
    requires=REQUIRES,
    space={"batch": Span(1, 3), "time": Span(4, 24), "weight": Choice(1.0, 0.25, -3.0)},
    grid=({"batch": 3, "time": 24, "weight": 1.0}, {"batch": 2, "time": 12, "weight": 0.25}),
)
def check_gradient(subject: Specimen, ctx: Context) -> None:
    """backward() of loss * weight, against autograd through a float64 cross-entropy of the same logits.

    Where the loss is computed from another tensor than the logits that are returned (a fused or chunked head), the
    gradients of all parameters are compared instead. Weights other than 1 show fused losses that compute their
    gradient in the forward pass and forget the incoming one.
    """
    import torch

    ignored = ignored_label(subject, ctx)
    for case in ctx.cases():
        ids = ctx.ids(case.batch, subject.longest(case.time))
        labels = draw_labels(subject, ctx, ids, "scattered", ignored)
        loss, logits = net_loss(subject, ctx, ids, labels, grad=True)
        reference = cross_entropy(logits, labels, subject.convention.labels_shifted, ignored)
        points, axes, allowed = comparison_points(subject, loss, logits, reference * abs(case.weight))
        actual = torch.autograd.grad(loss * case.weight, points, retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(reference * case.weight, points, allow_unused=True)
        compare_gradients(
            ctx, points, actual, expected, allowed, axes,
            f"gradient of loss * weight with respect to the {axes[-1]} differs from the reference's",
            f"{{ratio:.3g}} times as long as the reference's at weight {case.weight:g}",
            Hint(
                "the loss computes its gradient by hand and forgets to multiply it by the incoming one (grad_output)",
                "grad.wrong",
            )
            if case.weight != 1
            else "part of the logits is detached, an ignored label has a gradient, or the sum is divided by another "
            "count than the number of labels; loss.reference tells the last two apart",
        )  # fmt: skip


@register_check(
    "loss.accumulation",
    holds="k micro-batches of unequal label counts give the gradients of one batch, where the model takes the number "
    "of items",
    needs=("labels",),
    profile="smoke",
    requires=("loss.reference",),
    space={"micro": Span(2, 4), "time": Span(4, 24), "items": Choice("tensor", "int")},
    grid=({"micro": 4, "time": 24, "items": "tensor"}, {"micro": 2, "time": 12, "items": "int"}),
)
def check_accumulation(subject: Specimen, ctx: Context) -> None:
    """Each micro-batch is given num_items_in_batch of the whole; the gradients must add up to those of one batch.

    transformers' Trainer passes num_items_in_batch to every model that takes **kwargs and then leaves the loss
    undivided. Source: transformers issue 34242 and "Bugs in LLM training: gradient accumulation fix" (Unsloth, 2024).
    """
    import torch

    named, _, open_keywords = parameters_of(subject.module)
    if "num_items_in_batch" not in named and not open_keywords:
        ctx.not_applicable(f"{type(subject.module).__name__}.forward() takes no num_items_in_batch")
    if getattr(subject.module, "accepts_loss_kwargs", True) is False:
        ctx.not_applicable(f"{type(subject.module).__name__}.accepts_loss_kwargs is False")
    ignored, shifted = ignored_label(subject, ctx), subject.convention.labels_shifted
    for case in ctx.cases():
        ids = ctx.ids(4, subject.longest(case.time))
        labels = unequal_labels(subject, ctx, ids, ignored)
        count = int((labels[:, 1:] if shifted else labels).ne(ignored).sum())
        items = torch.tensor(count, device=ids.device) if case.items == "tensor" else count
        whole, logits = net_loss(subject, ctx, ids, labels, grad=True)
        if not taken(subject, ctx, ids, labels, whole, items):
            return
        points, axes, _ = comparison_points(subject, whole, logits, whole.double())
        rows = [list(range(start, 4, case.micro)) for start in range(case.micro)]
        expected = torch.autograd.grad(whole, points, allow_unused=True)
        on_logits = points[0] is logits
        actual: list[Any] = [torch.zeros_like(point) for point in points]
        for part in rows:
            loss, own = net_loss(subject, ctx, ids[part], labels[part], grad=True, extra={"num_items_in_batch": items})
            grads = torch.autograd.grad(loss, [own] if on_logits else points, allow_unused=True)
            for index, grad in enumerate(grads):
                if grad is not None and on_logits:
                    actual[index][part] = grad
                elif grad is not None:
                    actual[index] += grad
        size = max(float(logits.detach().abs().max()), 1.0)
        spread = max(subject.noise, tolerance.epsilon(whole.dtype) * size) * tolerance.FACTOR
        allowed = [spread * max(largest(grad) for grad in expected)] * len(points)
        compare_gradients(
            ctx, points, actual, expected, allowed, axes,
            "gradients of micro-batches that are given num_items_in_batch do not add up to those of one batch",
            "their sum is {ratio:.3g} times as long",
            Hint(
                "with num_items_in_batch the loss is the sum over labels divided by it, not the micro-batch's own mean",
                "loss.accumulation_wrong",
            ),
        )  # fmt: skip


# -- labels --------------------------------------------------------------------------------------------------------


def ignored_label(subject: Specimen, ctx: Context) -> int:
    """-100, or -1 where the model takes that instead. Violation where neither is taken."""
    found = subject.can("ignored_label")
    if found.value is None:
        ctx.fail(
            f"labels with {IGNORED} in them are refused ({found.reason})",
            hint=Hint(
                f"{IGNORED} marks labels that do not count: cross_entropy(..., ignore_index={IGNORED}), and no gather "
                "with the raw labels",
                "loss.ignore_index",
            ),
        )
        raise AssertionError("unreachable")
    if found.value != IGNORED:
        ctx.note(f"labels to be left out are {found.value}: {IGNORED} is refused ({found.reason})")
    return found.value


def draw_labels(subject: Specimen, ctx: Context, ids: Tensor, kind: str, ignored: int) -> Tensor:
    """Labels [batch, time] drawn apart from the ids."""
    import torch

    labels = ctx.ids(ids.shape[0], ids.shape[1], salt=7)
    if kind == "special":
        special = [*structure.special_ids(subject.module).values(), 0, subject.vocab_size - 1]
        special = [token for token in dict.fromkeys(special) if token < subject.vocab_size]
        places = labels[:, 1::2]
        filled = torch.tensor(special, device=ids.device).repeat(places.numel())[: places.numel()]
        labels[:, 1::2] = filled.view(places.shape)
    elif kind == "scattered":
        drawn = torch.rand(labels.shape, generator=ctx.generator(11, *labels.shape)).to(labels.device)
        labels = torch.where(drawn < 0.4, ignored, labels)
        labels[-1, -1] = ids[-1, -1]  # at least one is left, and not in the first place
    elif kind == "one":
        kept = labels[-1, -1].clone()
        labels.fill_(ignored)
        labels[-1, -1] = kept
    elif kind == "none":
        labels.fill_(ignored)
    return labels


def unequal_labels(subject: Specimen, ctx: Context, ids: Tensor, ignored: int) -> Tensor:
    """Labels [4, time] of which the rows keep very different numbers: all, one, half, two."""
    labels = ctx.ids(ids.shape[0], ids.shape[1], salt=7)
    time = ids.shape[1]
    for row, kept in enumerate((time, 1, time // 2, 2)):
        labels[row, : time - kept] = ignored
    return labels


# -- calling -------------------------------------------------------------------------------------------------------


def net_loss(
    subject: Specimen,
    ctx: Context,
    ids: Tensor,
    labels: Tensor,
    *,
    train: bool = False,
    grad: bool = False,
    extra: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and logits of one call; a stated auxiliary loss of expert routers is taken off the loss again.

    Violation where labels give an error, no loss, or (with `grad`) a loss without a gradient.
    """
    raws: list[Any] = []
    hook = subject.module.register_forward_hook(lambda module, inputs, output: raws.append(output))
    try:
        output = _call(subject, ids, labels, train, grad, extra or {})
    except Exception as error:
        if extra:
            raise
        ctx.fail(
            f"the model raised {type(error).__name__}: {first_line(error)} when given labels",
            hint=f"labels are [batch, time] of token ids, {IGNORED} where nothing is to be predicted",
        )
        raise
    finally:
        hook.remove()
    loss = output.loss
    if loss is None:
        if subject.convention.call is not None:
            ctx.not_applicable("call() takes labels but gives no loss back")
        ctx.fail(
            f"{subject.convention.labels} were given and no scalar loss came back",
            hint="return the loss beside the logits when labels are given",
        )
        raise AssertionError("unreachable")
    if grad and not loss.requires_grad:
        ctx.fail(
            "the loss carries no gradient",
            hint=Hint(
                "it was computed under no_grad(), from detached logits, or turned into a number with item()",
                "grad.wrong",
            ),
        )
    labelled = raws[0 if subject.convention.loss_alone else -1] if raws else None
    return loss - _auxiliary(subject, ctx, labelled), output.logits


def _call(subject: Specimen, ids: Tensor, labels: Tensor, train: bool, grad: bool, extra: dict[str, Any]) -> Any:
    if not extra:
        return subject.forward(ids, labels=labels, train=train, grad=grad)
    convention = subject.convention

    def call(module: Any, input_ids: Tensor, **keywords: Any) -> Any:
        if convention.call is not None:
            return convention.call(module, input_ids, **keywords, **extra)
        if convention.ids is None:
            return module(input_ids, **keywords, **extra)
        return module(**{convention.ids: input_ids}, **keywords, **extra)

    import torch

    subject.module.train(train)
    with torch.set_grad_enabled(grad):
        return dataclasses.replace(convention, call=call).run(subject.module, ids, labels=labels)


def _auxiliary(subject: Specimen, ctx: Context, raw: Any) -> Tensor | float:
    """Stated terms (aux_loss, z_loss, mtp_loss) as they enter the loss: coefficient * term, where both are stated."""
    import torch

    if isinstance(raw, tuple) and hasattr(raw, "_asdict"):
        raw = raw._asdict()
    fields: dict[str, Any] = raw if isinstance(raw, dict) else getattr(raw, "__dict__", {})
    total: Tensor | float = 0.0
    for term, value in fields.items():
        if not str(term).endswith("_loss") or not isinstance(value, torch.Tensor) or value.dim():
            continue
        found = [
            (name, coefficient)
            for holder in (subject.module, subject.config)
            for name in (pattern.format(term) for pattern in COEFFICIENTS)
            if isinstance(coefficient := getattr(holder, name, None), float | int)
        ]
        if found:
            name, coefficient = found[0]
            ctx.note(f"loss holds {name} * {term} (coefficient {coefficient:g}), taken off here")
            total = total + coefficient * value
    return total


class Added(NamedTuple):
    """What train mode adds to a loss that is right in eval mode."""

    value: float
    beside_logits: bool | None  # None: the loss is computed from another tensor than the logits given back


def added_in_training(subject: Specimen, ctx: Context, ids: Tensor, labels: Tensor, ignored: int) -> Added | None:
    """None where the loss of the same batch is wrong in eval mode too.

    A term beside the logits leaves the gradient of the loss towards the logits what the cross-entropy's is.
    """
    import torch

    shifted = subject.convention.labels_shifted
    loss, logits = net_loss(subject, ctx, ids, labels)
    if not abs(float(loss) - float(cross_entropy(logits, labels, shifted, ignored))) <= rounding(loss, logits):
        return None
    with buffers_kept(subject.module):
        loss, logits = net_loss(subject, ctx, ids, labels, train=True, grad=True)
        reference = cross_entropy(logits, labels, shifted, ignored)
        value = float(loss.detach().double() - reference.detach())
        points, _, (allowed, *_) = comparison_points(subject, loss, logits, reference)
        if points[0] is not logits:
            return Added(value, None)
        (actual,) = torch.autograd.grad(loss, points, retain_graph=True)
        (expected,) = torch.autograd.grad(reference, points)
        return Added(value, bool(largest(actual.double() - expected.double()) <= allowed))


def taken(subject: Specimen, ctx: Context, ids: Tensor, labels: Tensor, mean: Tensor, items: Any) -> bool:
    """Whether num_items_in_batch divides the loss. Violation where transformers' Trainer would be misled."""
    try:
        doubled, logits = net_loss(subject, ctx, ids, labels, extra={"num_items_in_batch": 2 * items})
    except TypeError as error:
        ctx.not_applicable(f"num_items_in_batch is refused: {first_line(error)}")
        return False
    ignored_it = abs(float(doubled) - float(mean)) <= rounding(doubled, logits)
    if ignored_it and not hasattr(subject.module, "main_input_name"):
        ctx.not_applicable("forward() takes **kwargs and has no use for num_items_in_batch")
    if ignored_it:
        ctx.fail(
            "num_items_in_batch is taken and ignored: with gradient accumulation each micro-batch counts as a whole "
            "batch",
            hint=Hint(
                "transformers' Trainer passes num_items_in_batch to a forward() with **kwargs and does not divide "
                "the loss: hand **kwargs on to self.loss_function, or set accepts_loss_kwargs = False",
                "loss.accumulation_wrong",
            ),
        )
    return True


# -- comparing gradients -------------------------------------------------------------------------------------------


def comparison_points(
    subject: Specimen, loss: Tensor, logits: Tensor, reference: Tensor
) -> tuple[list[Tensor], tuple[str, ...], list[float]]:
    """Where gradients are compared: the logits, or all parameters where the loss comes from another tensor.

    Also names of the axes (the last names the points) and the bound at each point. At parameters the bound is what
    rounding of the gradient at the logits does to them, measured.
    """
    import torch

    eps = max(tolerance.epsilon(loss.dtype), tolerance.epsilon(logits.dtype))
    if logits.requires_grad and torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)[0] is not None:
        (expected,) = torch.autograd.grad(reference, logits, retain_graph=True)
        size = max(1.0, float(logits.detach().abs().max()))
        return [logits], ("row", "position", "logits"), [tolerance.FACTOR * eps * size * largest(expected)]
    points: list[Tensor] = [p for p in subject.module.parameters() if p.requires_grad]
    (upstream,) = torch.autograd.grad(reference, logits, retain_graph=True)
    sign = torch.where(torch.arange(upstream.numel(), device=upstream.device) % 2 == 0, 1.0, -1.0).to(upstream)
    wobble = upstream * sign.view(upstream.shape) * eps
    moved = torch.autograd.grad(logits, points, grad_outputs=wobble, retain_graph=True, allow_unused=True)
    whole = torch.autograd.grad(logits, points, grad_outputs=upstream, retain_graph=True, allow_unused=True)
    allowed = [tolerance.FACTOR * max(largest(change), eps * max(largest(grad) for grad in whole)) for change in moved]
    return points, ("parameters",), allowed


def compare_gradients(
    ctx: Context,
    points: list[Tensor],
    actual: Any,
    expected: Any,
    allowed: list[float],
    axes: tuple[str, ...],
    message: str,
    place: str,
    hint: str,
) -> None:
    """Each gradient within its bound; a missing one counts as zero. `place` is given the ratio of the norms."""
    import torch

    names = {id(p): name for name, p in ctx.subject.module.named_parameters()}
    for point, one, other, bound in zip(points, actual, expected, allowed, strict=True):
        one = torch.zeros_like(point) if one is None else one
        other = torch.zeros_like(point) if other is None else other
        where = names.get(id(point), "")
        difference = (one.double() - other.double()).abs()
        if not bool((difference <= bound).all()):
            ratio = float(one.double().norm() / other.double().norm().clamp(min=1e-300))
            ctx.equal(
                one, other, message, where=", ".join(filter(None, [place.format(ratio=ratio), where])), hint=hint,
                allowed=bound, axes=("row", "position", "token"),
            )  # fmt: skip
        ctx.within(float(difference.max()), bound, message, where=where, hint=hint)


def largest(tensor: Tensor | None) -> float:
    """The largest magnitude in it; 0 for None."""
    return 0.0 if tensor is None or tensor.numel() == 0 else float(tensor.detach().abs().max())
