"""loss.terms: whatever a recipe's loss adds to cross-entropy has a gradient where it would be needed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.checks.loss_smoothing import smoothed, value_and_leaf
from lmconform.context import Hint
from lmconform.registry import register_check
from lmconform.sweep.corpus import end_of_text

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.recipe import Recipe
    from lmconform.specimen import Specimen

Form = tuple[float, str, bool]  # smoothing, how it is spread, whether the labels are shifted
BATCH, TIME = 3, 12
COLLAPSED = 0.86  # one token's share of the prediction: collapsed, and not yet past turning
PATH = (0.0, 0.5, COLLAPSED, 0.9997)  # from spread to nothing else; 0.0: as the logits are drawn


@register_check(
    "loss.terms",
    holds="where a recipe's loss differs from cross-entropy in value while a prediction collapses, its gradient "
    "differs too",
    needs=("recipe",),
    requires=(),
    profile="smoke",
)
def check_terms(subject: Specimen, ctx: Context) -> None:
    """The loss against cross-entropy (smoothed as stated) of logits by rule that collapse step by step onto one token.

    The token is an ordinary one, then EOS; its share of every prediction goes from what was drawn to 50, 86 and
    99.97 %. A term whose value answers to that, and which at 86 % is there without a gradient, cannot turn the
    collapse: it is clamped flat, counted by argmax, or detached. Source: a debugging report whose balanced loss was
    ce + 1 - clamp(entropy, 0, 0.5) while its top token had 82 to 86 %: an entropy above 0.5 nats.
    """
    recipe = subject.recipe
    recipe.need("loss")
    form = _nearest_form(subject, ctx, recipe)
    end = end_of_text(subject)
    ordinary = next(token for token in subject.ordinary_ids if token != end)
    every: list[_Point] = []
    for token in [ordinary] if end is None else [ordinary, end]:
        points = [_Point(ctx, recipe, form, *_collapsing(subject, ctx, token, share)) for share in PATH]
        every += points
        answers = max(point.term for point in points) - min(point.term for point in points)
        collapsed = points[PATH.index(COLLAPSED)]
        if answers <= max(point.rounding for point in points) or abs(collapsed.term) <= collapsed.rounding:
            continue  # a constant, or nothing at all
        ctx.within(
            collapsed.gradient_rounding / max(collapsed.gradient, 1e-300),
            1.0,
            f"the loss differs from cross-entropy by {collapsed.term:.3g} where one token has {COLLAPSED:.0%} of the "
            f"prediction (by {points[0].term:.3g} where it is spread, {points[-1].term:.3g} at {PATH[-1]:.2%}), and "
            "its gradient does not differ at all",
            where=f"token {token}{' (EOS)' if token == end else ''}",
            hint=Hint(
                "the term is clamped beyond its flat end, counted by argmax or unique, or detached: use one with a "
                "gradient wherever the prediction is too sharp, such as the divergence of the mean prediction from "
                "the labels' own shares",
                "loss.term_saturated",
            ),
        )
    if all(abs(point.term) <= point.rounding for point in every):
        ctx.not_applicable("the recipe's loss is cross-entropy and nothing else")
    terms = [point.term for point in every]
    if max(terms) - min(terms) <= max(point.rounding for point in every):
        ctx.note(f"the loss is cross-entropy plus a constant, {terms[0]:.3g}")


class _Point:
    """One place on the way: what the loss adds to cross-entropy there, in value and in gradient."""

    def __init__(self, ctx: Context, recipe: Recipe, form: Form, logits: Tensor, labels: Tensor) -> None:
        assert recipe.loss is not None
        value, leaf = value_and_leaf(ctx, recipe.loss, logits, labels)
        own = _gradient(ctx, value, leaf)
        wide = logits.clone().requires_grad_()
        reference = smoothed(wide, labels, *form)
        plain = _gradient(ctx, reference, wide)
        self.term = float(value.detach().double() - reference.detach())
        unit = tolerance.FACTOR * tolerance.epsilon(logits.dtype)
        self.rounding = unit * max(1.0, abs(float(reference.detach())), float(logits.abs().max()))
        self.gradient = float((own.double() - plain.double()).abs().max())
        self.gradient_rounding = unit * float(plain.abs().max())


def _gradient(ctx: Context, value: Tensor, leaf: Tensor) -> Tensor:
    import torch

    if not value.requires_grad:
        ctx.fail(
            "loss(logits, labels) carries no gradient",
            hint=Hint("it is detached, or turned into a number with item()", "loss.term_saturated"),
        )
    (gradient,) = torch.autograd.grad(value, [leaf])
    return gradient


def _collapsing(subject: Specimen, ctx: Context, token: int, share: float) -> tuple[Tensor, Tensor]:
    """Logits [batch, time, vocab] whose prediction gives `token` that share in every place, and labels by rule."""
    import torch

    generator = ctx.generator(37)
    logits = torch.randn(BATCH, TIME, subject.vocab_size, generator=generator)
    labels = torch.randint(0, subject.vocab_size, (BATCH, TIME), generator=generator)
    labels[:, TIME // 2] = token  # once a row, it is what is wanted
    if share:
        chance = logits.softmax(-1)[..., token]
        logits[..., token] += math.log(share / (1 - share)) - (chance / (1 - chance)).log()
    return logits, labels


def _nearest_form(subject: Specimen, ctx: Context, recipe: Recipe) -> Form:
    """The smoothed cross-entropy as stated, shifted or not, whose gradient comes nearest to the loss's own."""
    assert recipe.loss is not None
    logits, labels = _collapsing(subject, ctx, 0, 0.0)
    value, leaf = value_and_leaf(ctx, recipe.loss, logits, labels)
    own = _gradient(ctx, value, leaf).double()

    def distance(form: Form) -> float:
        wide = logits.clone().requires_grad_()
        return float((_gradient(ctx, smoothed(wide, labels, *form), wide).double() - own).norm())

    spreads = ("all", "others") if recipe.label_smoothing else ("all",)
    forms = [(recipe.label_smoothing or 0.0, spread, shifted) for shifted in (True, False) for spread in spreads]
    return min(forms, key=distance)
