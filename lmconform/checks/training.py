"""training: the model learns: a sentence by heart, at some rate, every weight taking part."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lmconform import charts
from lmconform.checks.shared_sweep import MEMORISED, STEPS, Swept, swept, trainable_size
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring.adapters import ADAPTERS, wraps_adapters
from lmconform.registry import register_check
from lmconform.sweep.corpus import entropy
from lmconform.sweep.rates import ASSUMED_STEPS, Outcome, given_rate

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

REQUIRES = ("contract.shape", "contract.finite")
MOSTLY_FROZEN = 0.05  # a share of trained weights below which no sentence need be learnt
FROZEN = Hint(
    "nearly all is frozen, and what is left holds no sentence: look for requires_grad_(False) over the whole model, "
    "undone for some parameters only",
    "grad.frozen",
)
NEAR = 0.1  # nats above a floor within which a loss stands at it; below it there is none


@register_check(
    "training.memorize",
    holds="one sentence: loss < 0.1 within 100 steps of AdamW at the best swept rate, and greedy decoding says it back",
    needs=("rebuild",),
    requires=REQUIRES,
)
def check_memorize(subject: Specimen, ctx: Context) -> None:
    """Fresh weights, dropout off, a sentence of 16 tokens of which three come back and are followed by others.

    A model that sees only the current token stops at a loss that can be computed, and so is told apart from one that
    does not learn at all. Decoding is an argmax loop over plain forwards, from the first two tokens. The rates are
    those of training.lr_sweep.
    """
    if wraps_adapters(subject.module):
        ctx.not_applicable(ADAPTERS)
    found = swept(subject, ctx)
    best = found.best
    losses = found.training.losses[best]
    reached = min(losses[-3:]) if not found.training.diverged[best] else math.inf
    rate = found.training.members[best].rate
    title = "Loss while one sentence is learnt"
    ctx.record(
        charts.curves(
            title, "step", "loss", {"loss": losses}, bound=MEMORISED, log="y", case=f"AdamW at rate {rate:.2g}"
        )
    )
    ctx.note(
        f"{found.training.mode}{_why(found)}; loss {losses[0]:.2f} to {reached:.3g} in {len(losses)} steps at rate "
        f"{rate:.2g}"
    )
    if reached >= MEMORISED:
        told, hint = _floor(found.sentence, reached, losses[0], _trainable(subject))
        ctx.within(
            reached, MEMORISED, f"one sentence of {found.sentence.shape[1]} tokens is not memorised within {STEPS} "
            f"steps of AdamW at any rate{told}", where=f"rate {rate:.2g}, loss {losses[0]:.3g} at first", hint=hint,
        )  # fmt: skip
    ctx.within(reached, MEMORISED, "loss on the memorised sentence", where=f"rate {rate:.2g}")
    said = _continued(found.training.trained(best), found.sentence[:, :2], found.sentence.shape[1])
    wrong = (said != found.sentence)[0].nonzero().flatten().tolist()
    if wrong:
        ctx.fail(
            f"a sentence learnt to a loss of {reached:.2g} is not said back by greedy decoding: {len(wrong)} of "
            f"{found.sentence.shape[1] - 2} tokens are wrong",
            where=f"first at position {wrong[0]}",
            hint=Hint(
                "what is predicted in training is not what is predicted from a prefix: attention sees the token that "
                "is to be predicted (no causal mask), or train and eval mode compute different things",
                "training.label_leak",
                "mask.missing",
            ),
        )


def _why(found: Swept) -> str:
    return f" ({found.training.reason})" if found.training.reason else ""


def _trainable(subject: Specimen) -> float:
    """The share of the weights that are trained."""
    counts = [(p.numel(), p.requires_grad) for p in subject.module.parameters()]
    return sum(many for many, trained in counts if trained) / max(1, sum(many for many, _ in counts))


def _floor(ids: Tensor, reached: float, start: float, trainable: float) -> tuple[str, str]:
    """Whether the loss stands where a model without context must stop: words for the message, and the hint."""
    tokens = ids[0].tolist()
    after = defaultdict(list)
    for token, following in pairwise(tokens):
        after[token].append(following)
    pairs = sum(len(seen) * entropy(Counter(seen).values()) for seen in after.values()) / (len(tokens) - 1)
    alone = entropy(Counter(tokens[1:]).values())
    if -NEAR / 5 < reached - pairs < NEAR:
        return (
            f": the loss stops at {pairs:.2f}, where a model must stop that sees the current token alone",
            Hint(
                "attention brings nothing from earlier tokens: it is skipped, gated off, multiplied by zero, or its "
                "output is not added to the residual stream; training.uses_context says more",
                "attention.gated_off",
                "training.ignores_context",
            ),
        )
    if -NEAR / 5 < reached - alone < NEAR:
        return (
            f": the loss stops at {alone:.2f}, where a model must stop that knows only how often each token comes",
            Hint(
                "nothing of the input reaches the output that can be trained: layers are frozen or detached, and only "
                "the output bias or the last norm learns; gradients.reach and training.step name the parameters",
                "grad.frozen",
                "grad.dead_parameter",
            ),
        )
    if reached > 0.9 * start:
        return (
            ": the loss hardly falls",
            Hint(
                "the gradient does not reach the weights (detach(), no_grad(), everything frozen), or the logits are "
                "bounded or scaled down so that no token can be told from the others",
                "training.cannot_memorize",
                "grad.frozen",
                "grad.dead_parameter",
            ),
        )
    if trainable < MOSTLY_FROZEN:
        return f", and {trainable:.2g} of its weights are trainable", FROZEN
    return (
        "",
        Hint(
            "layers are frozen or detached, logits are bounded (soft-capped too low), or hidden states are scaled so "
            "that the weights cannot move them; gradients.reach and training.step name the parameters that stay where "
            "they are",
            "training.cannot_memorize",
            "grad.frozen",
        ),
    )


def _continued(trained: Specimen, prompt: Tensor, time: int) -> Tensor:
    """Greedy decoding by plain forwards, to `time` tokens."""
    import torch

    said = prompt
    while said.shape[1] < time:
        said = torch.cat([said, trained.logits(said)[:, -1:].argmax(-1)], dim=1)
    return said


@register_check(
    "training.lr_sweep",
    holds="some rate in 1e-5 ... 1e-1 converges; the given rate lies in the good range; the curve is in the report",
    needs=("rebuild",),
    requires=REQUIRES,
)
def check_lr_sweep(subject: Specimen, ctx: Context) -> None:
    """AdamW from fresh weights on one sentence, all rates in one vectorised run where the model allows it.

    The good range is that of the rates that make 90 % of the best one's progress in 100 steps. A recipe's rate is
    followed through its scheduler to its highest value. A longer run gets as far with a smaller rate, so the range's
    lower end is divided by (steps of the recipe / 100); where the recipe does not say, 1000 steps are assumed.
    """
    if wraps_adapters(subject.module):
        ctx.not_applicable(ADAPTERS)
    found = swept(subject, ctx).outcome
    given = given_rate(subject.recipe, subject.fresh(ctx.seed).module)
    ctx.record(_curve(found, None if isinstance(given, str) else given.rate))
    curve = ", ".join(f"{row.rate:.0e} {row.final:.2g}{' diverged' if row.diverged else ''}" for row in found.rows)
    ctx.note(f"loss after {found.steps} steps by rate: {curve}")
    if found.good_range is None:
        ctx.within(
            found.best.final, found.target, f"no learning rate from {found.rows[0].rate:.0e} to "
            f"{found.rows[-1].rate:.0e} halves the loss on one sentence in {found.steps} steps",
            where=f"at best rate {found.best.rate:.2g}",
            hint=FROZEN if _trainable(subject) < MOSTLY_FROZEN else Hint(
                "no rate mends this: the gradient does not reach the weights, or the initial weights are far too large "
                "or too small; gradients.reach, init.loss and init.scale say which", "training.cannot_memorize",
            ),
        )  # fmt: skip
        return
    low, high = found.good_range
    ctx.note(f"good range {low:.1g} to {high:.1g}, recommended {found.recommended:.1g}")
    if isinstance(given, str):
        if subject.recipe is not None:
            ctx.note(f"the recipe's rate is not compared: {given}")
        return
    steps = given.steps or ASSUMED_STEPS
    place = found.place(given.rate, steps)
    if place == "too small":
        least = low / max(1.0, steps / found.steps)
        dead = given.stated > 100 * given.rate
        ctx.fail(
            f"the recipe's learning rate, {given.words}, is too small: weights cannot get far enough in {steps} steps"
            f"{'' if given.steps else ' (assumed, the recipe does not say)'}; at least {least:.1g} is needed, "
            f"and {found.recommended:.1g} learns best",
            measured=given.rate,
            hint=Hint(
                "the scheduler brings the rate down to nearly nothing: a factor that multiplies the rate where it is "
                "meant to be the rate itself, or one that is stepped once per epoch; training.schedule says which",
                "lr.schedule_per_epoch",
            )
            if dead
            else Hint(
                "raise the rate before changing the model or the loss: with such a rate little more than the output "
                "bias learns, and the model says the most frequent token",
                "lr.too_small",
            ),
        )
    if place == "too large":
        ctx.fail(
            f"the recipe's learning rate, {given.words}, is too large: the good range is {low:.1g} to {high:.1g}",
            measured=given.rate,
            allowed=high,
            hint=Hint(
                "lower the rate; warm-up and clipping move the edge a little, not by an order of magnitude",
                "lr.too_large",
            ),
        )
    ctx.note(f"the recipe's rate, {given.words}, is good")


def _curve(found: Outcome, given: float | None) -> charts.Curves:
    """Loss at the end by rate, with the good range, the recommended rate and the recipe's own."""
    marks = {"recommended": found.recommended, "the recipe's": given}
    return charts.curves(
        "Loss by learning rate", "learning rate", f"loss after {found.steps} steps",
        {"at the end": [row.final for row in found.rows]}, x=[row.rate for row in found.rows], log="x",
        marks={name: rate for name, rate in marks.items() if rate is not None},
        span=None if found.good_range is None else ("good range", *found.good_range),
    )  # fmt: skip


@register_check(
    "training.step",
    holds="one optimizer step moves every trainable parameter, none that is frozen",
    requires=REQUIRES,
)
def check_step(subject: Specimen, ctx: Context) -> None:
    """One step of the recipe's optimizer (else AdamW at 1e-3, no decay) on random tokens, train mode, dropout off.

    Where the weights are large enough for everything to be felt (the subject's excited ones). A parameter whose
    gradient is exactly zero by its nature (it moves no logit) is left to gradients.reach. "Moved" is bit for bit.
    """
    import torch

    from lmconform.measuring.dropout import without_dropout
    from lmconform.sweep.batches import cross_entropy, next_token

    if subject.can("rebuild"):
        trainable_size(subject, ctx)
    copy = without_dropout(subject)
    batch = next_token(ctx.ids(4, subject.longest(24)))
    before = {name: parameter.detach().clone() for name, parameter in copy.module.named_parameters()}
    optimizers, whose = _optimizers(subject, ctx, copy)
    loss = cross_entropy(copy.logits(batch.ids, train=True, grad=True), batch.targets)
    if not loss.requires_grad:
        ctx.fail(
            "the loss carries no gradient in train mode: no optimizer step can move a weight",
            hint=Hint("forward() runs under no_grad() or detaches the logits, or everything is frozen", "grad.frozen"),
        )
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    after = dict(copy.module.named_parameters())
    stayed: list[str] = []
    felt: list[str] = []
    strayed: list[str] = []
    for name, old in before.items():
        new = after.get(name)
        if new is None or new.shape != old.shape:
            ctx.fail(f"the optimizer step replaced {name}", hint="weights are updated in place")
            continue
        same = torch.equal(new.detach(), old)
        if not new.requires_grad:
            strayed += [] if same else [name]
        elif same and old.numel():
            (felt if new.grad is not None and bool(new.grad.any()) else stayed).append(name)
    if strayed:
        ctx.fail(
            f"one step of {whose} changed {len(strayed)} frozen parameter{_s(strayed)} (requires_grad=False)",
            where=_list(strayed),
            hint=Hint(
                "frozen weights are in the optimizer and are decayed, or forward() writes to its weights",
                "state.carried_over",
                "grad.frozen",
            ),
        )
    if felt:
        ctx.fail(
            f"one step of {whose} left {len(felt)} of {len(before)} parameters where they were, although they have a "
            "gradient",
            where=_list(felt),
            hint=Hint("they are not in the optimizer, or their group's rate is zero", "optimizer.missing_parameters"),
        )
    moved = [name for name in stayed if _matters(subject, ctx, name)]
    if moved:
        ctx.fail(
            f"one step of {whose} left {len(moved)} of {len(before)} parameters where they were: no gradient reached "
            "them, although changing them changes the logits",
            where=_list(moved),
            hint=Hint(
                "a detach(), .data, .item() or no_grad() lies between them and the logits", "grad.dead_parameter"
            ),
        )
    for name in stayed:
        ctx.note(f"{name} does not move, and moves no logit: see gradients.reach")


def _matters(subject: Specimen, ctx: Context, name: str) -> bool:
    """Whether changing that parameter changes the logits of the same tokens by more than rounding."""
    import torch

    from lmconform import tolerance

    copy = subject.copy()
    parameter = copy.module.get_parameter(name)
    ids = ctx.ids(4, subject.longest(24))
    before = subject.logits(ids)
    noise = torch.randn(parameter.shape, generator=ctx.generator(3, *parameter.shape)).to(parameter)
    with torch.no_grad():
        parameter.add_(noise * max(float(parameter.abs().mean()), 0.1))
    change = float((copy.logits(ids) - before).abs().max())
    return change > tolerance.allowed(subject.noise, before)


def _optimizers(subject: Specimen, ctx: Context, copy: Specimen) -> tuple[list[Any], str]:
    import torch

    recipe = subject.recipe
    if getattr(recipe, "make_optimizer", None) is not None:
        copy.module.train()
        try:
            return recipe.optimizers(copy.module), "the recipe's optimizer"
        except Exception as error:
            ctx.not_applicable(f"make_optimizer(model) raised {type(error).__name__}: {first_line(error)}")
    live = [parameter for parameter in copy.module.parameters() if parameter.requires_grad]
    if not live:
        ctx.not_applicable("no parameter requires a gradient")
    return [torch.optim.AdamW(live, lr=1e-3, weight_decay=0.0)], "AdamW"


def _s(things: list[str]) -> str:
    return "" if len(things) == 1 else "s"


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
