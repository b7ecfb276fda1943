"""loss.smoothing: label smoothing equals its closed form. It needs logits and labels only, so the model is not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.checks.cross_entropy import IGNORED
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.registry import register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.recipe import Recipe
    from lmconform.specimen import Specimen

Loss = Callable[["Tensor", "Tensor"], "Tensor"]
BATCH, TIME = 3, 12


@register_check(
    "loss.smoothing",
    holds="label smoothing equals its closed form, ignored labels left out",
    needs=("recipe",),
    requires=(),
    profile="smoke",
)
def check_smoothing(subject: Specimen, ctx: Context) -> None:
    """(1 - e) * cross-entropy + e * the mean of -log p over the vocabulary, averaged over the labels that count.

    Compared in value and in gradient, with every label, with -100 scattered, and with logits so large that a logarithm
    of a softmax saturates. The other definition in use, e / (vocab - 1) on the other tokens, is accepted and noted.
    Where the smoothing is not stated it is fitted to one batch and must explain the others. Source: Szegedy et al.
    2016, section 7; Vaswani et al. 2017, section 5.4.
    """
    recipe = subject.recipe
    recipe.need("loss")
    smoothing, spread, shifted = _definition(ctx, subject, recipe)
    ctx.note(
        f"loss(logits, labels) smooths by {smoothing:g}{'' if spread == 'all' else ' (over the other tokens only)'} "
        f"and {'shifts' if shifted else 'does not shift'} the labels"
    )
    for kind in ("all", "scattered", "sharp", "one"):
        logits, labels = _inputs(subject, ctx, kind)
        actual, given = value_and_leaf(ctx, recipe.loss, logits, labels)
        expected = smoothed(logits, labels, smoothing, spread, shifted)
        difference, allowed = abs(float(actual.detach().double()) - float(expected.detach())), _bound(logits)
        where = f"loss {float(actual.detach()):.6g}, expected {float(expected.detach()):.6g} (labels: {kind})"
        if not difference <= allowed:
            what, hint = _explain(float(actual.detach()), logits, labels, smoothing, spread, shifted, allowed)
            ctx.within(
                difference if difference == difference else float("inf"),
                allowed,
                f"label smoothing differs from its closed form{what}",
                where=where,
                hint=hint,
            )
        ctx.within(difference, allowed, "label smoothing", where=where)
        _check_gradient(ctx, actual, given, logits, labels, (smoothing, spread, shifted), kind)


def smoothed(logits: Tensor, labels: Tensor, smoothing: float, spread: str = "all", shifted: bool = True) -> Tensor:
    """The closed form in float64: `spread` over "all" tokens of the vocabulary or only the "others"."""
    nll, uniform, live = _terms(logits, labels, shifted)
    if spread == "others":
        size = logits.shape[-1]
        uniform = (uniform * size - nll) / (size - 1)
    return (((1 - smoothing) * nll + smoothing * uniform) * live).sum() / live.sum()


def _terms(logits: Tensor, labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-log p of each label, the mean of -log p over the vocabulary, and where a label counts: [batch, time] each."""
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    wide = logits.double()
    log_p = wide - wide.logsumexp(-1, keepdim=True)
    nll = -log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return nll, -log_p.mean(-1), labels != IGNORED


def _inputs(subject: Specimen, ctx: Context, kind: str) -> tuple[Tensor, Tensor]:
    """Logits and labels made by rule; ten times as large where `kind` is sharp."""
    import torch

    generator = ctx.generator(31, len(kind))
    logits = torch.randn(BATCH, TIME, subject.vocab_size, generator=generator) * (30 if kind == "sharp" else 2)
    labels = torch.randint(0, subject.vocab_size, (BATCH, TIME), generator=generator)
    if kind == "scattered":
        labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.4, IGNORED, labels)
        labels[0, 4:] = IGNORED
        labels[-1, -1] = 0  # token 0 is a label like any other
    elif kind == "one":
        kept = labels[1, 5].clone()
        labels.fill_(IGNORED)
        labels[1, 5] = kept
    return logits, labels


def value_and_leaf(ctx: Context, loss: Loss, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the leaf it was computed from. Unavailable where it is no scalar, Violation where it raises."""
    given = logits.clone().requires_grad_()
    try:
        value = loss(given, labels.clone())
    except Exception as error:
        ctx.fail(
            f"loss(logits, labels) raised {type(error).__name__}: {first_line(error)}",
            hint=f"logits are [batch, time, vocab], labels [batch, time] with {IGNORED} where nothing counts",
        )
        raise AssertionError("unreachable") from error
    if getattr(value, "dim", lambda: 1)() != 0:
        ctx.not_applicable("loss(logits, labels) gives no scalar")
    return value, given


def _definition(ctx: Context, subject: Specimen, recipe: Recipe) -> tuple[float, str, bool]:
    """The smoothing, how it is spread, and whether the loss shifts: stated or fitted on batches without -100.

    Raises Unavailable where nothing is stated and the loss is no smoothed cross-entropy at all.
    """
    assert recipe.loss is not None
    logits, labels = _inputs(subject, ctx, "all")
    value = float(value_and_leaf(ctx, recipe.loss, logits, labels)[0].detach())

    def explains(smoothing: float, spread: str, shifted: bool) -> bool:
        return abs(float(smoothed(logits, labels, smoothing, spread, shifted)) - value) <= _bound(logits)

    forms = [(spread, shifted) for shifted in (True, False) for spread in ("all", "others")]
    for spread, shifted in forms:
        if recipe.label_smoothing is not None and explains(recipe.label_smoothing, spread, shifted):
            return recipe.label_smoothing, spread, shifted
    if recipe.label_smoothing is not None:
        # which of the two shifts comes nearer decides what the message compares with
        nearest = min(
            (True, False), key=lambda shifted: abs(float(smoothed(logits, labels, 0.0, "all", shifted)) - value)
        )
        return recipe.label_smoothing, "all", nearest
    if explains(0.0, "all", True) or explains(0.0, "all", False):
        ctx.not_applicable("the recipe states no label_smoothing, and its loss does none")
    for spread, shifted in forms:
        fitted = _fitted(subject, ctx, recipe.loss, spread, shifted)
        if 0 < fitted < 1 and explains(fitted, spread, shifted):
            return fitted, spread, shifted
    ctx.not_applicable("the recipe states no label_smoothing, and its loss is no smoothed cross-entropy")
    raise AssertionError("unreachable")


def _fitted(subject: Specimen, ctx: Context, loss: Loss, spread: str, shifted: bool) -> float:
    """The smoothing that explains a batch of likely labels, on which it tells; to four decimals, as it is written."""
    logits, _ = _inputs(subject, ctx, "likely")
    labels = logits.argmax(-1)
    if shifted:
        labels = labels.roll(1, dims=1)
    value = float(value_and_leaf(ctx, loss, logits, labels)[0].detach())
    plain = float(smoothed(logits, labels, 0.0, spread, shifted))
    whole = float(smoothed(logits, labels, 1.0, spread, shifted))
    return round((value - plain) / (whole - plain), 4)


def _bound(logits: Tensor) -> float:
    """The suite's factor times one unit in the last place of the largest log-probability."""
    largest = 2 * float(logits.abs().max())
    return tolerance.FACTOR * tolerance.epsilon(logits.dtype) * max(1.0, largest)


def _check_gradient(
    ctx: Context,
    actual: Tensor,
    given: Tensor,
    logits: Tensor,
    labels: Tensor,
    form: tuple[float, str, bool],
    kind: str,
) -> None:
    import torch

    hint = Hint(
        "part of the loss is detached, or computed from an argmax: only its value is right", "loss.smoothing_wrong"
    )
    if not actual.requires_grad:
        ctx.fail("the smoothed loss carries no gradient", where=f"labels: {kind}", hint=hint)
    (got,) = torch.autograd.grad(actual, [given])
    wide = logits.double().requires_grad_()
    smoothing, spread, shifted = form
    (want,) = torch.autograd.grad(smoothed(wide, labels, smoothing, spread, shifted), [wide])
    ctx.equal(
        got,
        want.to(got.dtype),
        "gradient of the smoothed loss with respect to the logits differs from the closed form's",
        allowed=tolerance.FACTOR * tolerance.epsilon(logits.dtype),
        where=f"labels: {kind}",
        hint=hint,
    )


def _explain(
    value: float, logits: Tensor, labels: Tensor, smoothing: float, spread: str, shifted: bool, allowed: float
) -> tuple[str, str]:
    """Which common mistake gives exactly this loss: words for the message, and the hint."""
    nll, uniform, live = _terms(logits, labels, shifted)
    count = live.sum()
    hard = (nll * live).sum() / count
    size = logits.shape[-1]
    both = (1 - smoothing) * nll + smoothing * uniform
    clamped = "ignored labels are clamped to 0 for the gather, so they must be masked out of both terms afterwards"
    candidates = [
        (hard, "the labels are not smoothed at all", f"label_smoothing={smoothing:g} is stated and not passed on"),
        (
            (1 - smoothing) * hard + smoothing * uniform.mean(),
            f"positions whose label is {IGNORED} count in the uniform part",
            clamped,
        ),
        (
            (both * live).sum() / live.numel(),
            "the sum is divided by all positions, ignored ones too",
            f"divide by the number of labels that are not {IGNORED}",
        ),
        (both.mean(), f"labels {IGNORED} are taken for token 0 and counted", clamped),
        (
            (1 - smoothing) * hard + smoothing * (uniform * live).sum() / live.numel(),
            "the uniform part is divided by all positions, ignored ones too",
            "both terms are averaged over the same labels",
        ),
        (
            (1 - smoothing) * hard + smoothing * (uniform * live).sum() / count * size,
            "the uniform part is a sum over the vocabulary, not a mean",
            f"e / vocab for each token: divide by {size}",
        ),
        (
            hard + smoothing * (uniform * live).sum() / count,
            "the uniform part is added to the whole cross-entropy",
            "the label keeps 1 - e of the weight: (1 - e) * nll + e * uniform",
        ),
        (
            smoothing * hard + (1 - smoothing) * (uniform * live).sum() / count,
            "the two weights are swapped",
            "the label keeps 1 - e, the uniform part gets e",
        ),
    ]
    for candidate, what, hint in candidates:
        if abs(float(candidate) - value) <= 4 * allowed:
            return f": {what}", hint
    return (
        "",
        Hint(
            f"compare with F.cross_entropy(logits, labels, label_smoothing={smoothing:g}, ignore_index={IGNORED}): "
            "look for log(softmax(x) + 1e-10), which saturates, and for ignored labels in either term",
            "loss.smoothing_wrong",
        ),
    )
