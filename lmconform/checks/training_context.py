"""training: what can be learnt only through context is learnt, and what cannot be known is not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lmconform.checks.shared_sweep import good_rate, trainable_size
from lmconform.context import Hint
from lmconform.measuring.adapters import ADAPTERS, wraps_adapters
from lmconform.registry import register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen
    from lmconform.sweep.batches import Batches
    from lmconform.sweep.members import Training

REQUIRES = ("contract.shape", "contract.finite")
SHARES = (1.0, 0.3, 0.1)  # of the recommended rate
ROWS = 8
ALPHABET = 8
PERIOD = 2  # tokens of a pattern
TIMES = 4  # a pattern comes in a row
LEARNT = 0.1  # nats: nearly zero, where chance is ln 7 or ln 6
SURE = 0.03
RIGHT = 0.9  # share of held-out tokens that must come out from the prefix alone
STEPS = 300
DRAWN = 4  # tokens that honest draws from: chance is a quarter
HONEST_STEPS, HONEST_ROWS, HONEST_TIME = 60, 16, 6
HELD_OUT = 64
SIGMAS = 5.0


@register_check(
    "training.uses_context",
    holds="learns to copy a pattern that comes back to near zero loss: impossible without attention to earlier tokens",
    needs=("rebuild",),
    requires=REQUIRES,
)
def check_uses_context(subject: Specimen, ctx: Context) -> None:
    """Rows of two random tokens that alternate, new ones at every step.

    The current token says nothing about the next; only an earlier one does. Held-out patterns are then continued from
    the prefix alone. Order is not asked for: positions.order_matters does that, and attention with linear biases takes
    thousands of steps to learn a pattern of three.
    """
    if wraps_adapters(subject.module):
        ctx.not_applicable(ADAPTERS)
    trainable_size(subject, ctx)
    period = PERIOD
    from lmconform.sweep.members import Member, train

    alphabet = subject.ordinary_ids[:ALPHABET]
    if len(alphabet) <= period:
        ctx.not_applicable(f"{len(alphabet)} ordinary tokens are too few for a pattern of {period}")
    time = subject.longest(TIMES * period)
    if time <= period:
        ctx.not_applicable(f"a context of {time} tokens is too short for a pattern of {period} to come back")
    rate = good_rate(subject, ctx)
    members = [Member(rate * share, ctx.seed) for share in SHARES]
    steps = STEPS
    training = train(
        subject, members, _patterns(subject, ctx, alphabet, period, time), steps, done_below=SURE, one_is_enough=True
    )
    index = _lowest(training)
    losses = training.losses[index]
    reached = max(losses[-3:])
    ctx.note(
        f"pattern of {period}: loss {reached:.2g} after {len(losses)} steps at rate {members[index].rate:.2g} "
        f"({training.mode})"
    )
    blind = math.log(len(alphabet) - 1)
    if reached >= LEARNT:
        nothing = reached > 0.9 * blind
        ctx.within(
            reached,
            LEARNT,
            f"tokens that go round in a pattern of {period} are not learnt in {steps} steps"
            + (
                f": the loss stays at {blind:.2f}, that of a model which sees the current token alone"
                if nothing
                else ""
            ),
            where=f"rates {', '.join(f'{member.rate:.2g}' for member in members)}",
            hint=Hint(
                "attention brings nothing from earlier tokens: skipped, gated off, every token attends to itself "
                "alone, or its output is not added",
                "attention.gated_off",
                "training.ignores_context",
            )
            if nothing
            else Hint(
                "attention finds earlier tokens badly: scores are unscaled or too flat, heads are mixed up, or "
                "positions are lost; scale.attention and positions.order_matters say more",
                "training.ignores_context",
                "attention.unscaled",
            ),
        )
    ctx.within(reached, LEARNT, f"loss on a pattern of {period}")
    ids = _patterns(subject, ctx, alphabet, period, time)(steps + 1, ctx.seed).ids
    trained = training.trained(index)
    wanted, right = 0, 0
    for end in range(period, ids.shape[1]):
        said = trained.logits(ids[:, :end])[:, -1].argmax(-1)
        right += int((said == ids[:, end]).sum())
        wanted += ids.shape[0]
    if right < RIGHT * wanted:
        ctx.fail(
            f"a pattern learnt to a loss of {reached:.2g} is continued rightly for {right} of {wanted} held-out tokens "
            "when the model is given the prefix alone",
            measured=1 - right / wanted,
            allowed=1 - RIGHT,
            hint=Hint(
                "in training attention sees the token that is to be predicted: there is no causal mask, or it is not "
                "applied in train mode; causality.no_future_leak shows where",
                "training.label_leak",
                "mask.missing",
                "mask.train_only",
            ),
        )


def _patterns(subject: Specimen, ctx: Context, alphabet: list[int], period: int, time: int) -> Batches:
    import torch

    from lmconform.sweep.batches import IGNORED, Batch, next_token

    made: dict[int, Batch] = {}

    def batch(step: int, seed: int) -> Batch:
        if step not in made:
            made.clear()
            generator = ctx.generator(21, period, step)
            order = torch.stack([torch.randperm(len(alphabet), generator=generator)[:period] for _ in range(ROWS)])
            ids = torch.tensor(alphabet)[order].repeat(1, time // period + 1)[:, :time].contiguous()
            ids = ids.to(subject.device)
            made[step] = next_token(ids)
            made[step].targets[:, : period - 1] = IGNORED
        return made[step]

    return batch


def _lowest(training: Training) -> int:
    def rank(index: int) -> float:
        return math.inf if training.diverged[index] or not training.losses[index] else max(training.losses[index][-3:])

    return min(range(len(training.members)), key=rank)


@register_check(
    "training.honest",
    holds="accuracy on unguessable tokens is chance, on held-out rows after training: anything above is a leak",
    needs=("rebuild",),
    requires=REQUIRES,
)
def check_honest(subject: Specimen, ctx: Context) -> None:
    """Trained on rows of four tokens drawn at random, new ones at every step; labels are given where they are taken.

    Nothing can be learnt but the chance of a quarter. The bound on held-out accuracy is chance and five standard
    deviations of as many fair guesses. This is what a validation accuracy of 99.9 % should have been asked.
    """
    from lmconform.sweep.batches import given_labels
    from lmconform.sweep.members import Member, train

    trainable_size(subject, ctx)
    drawn = subject.ordinary_ids[:DRAWN]
    time = subject.longest(HONEST_TIME)
    if time < 2:
        ctx.not_applicable(f"a context of {time} tokens leaves nothing to predict")
    with_labels = subject.can("labels") and not (subject.convention.loss_alone or subject.convention.kept_loss)
    labels = bool(with_labels and subject.can("ignored_label"))  # found out before anything is stacked
    rate = good_rate(subject, ctx)
    training = train(
        subject,
        [Member(rate * share, ctx.seed) for share in SHARES],
        _random_rows(subject, ctx, drawn, HONEST_ROWS, time),
        HONEST_STEPS,
        labels=labels,
        done_below=0.3 * math.log(len(drawn)),
        one_is_enough=True,
    )
    index = _lowest(training)
    trained = training.trained(index)
    batch = _random_rows(subject, ctx, drawn, HELD_OUT, time)(HONEST_STEPS + 1, ctx.seed)
    chance = 1 / len(drawn)
    count = int((batch.targets >= 0).sum())
    allowed = chance + SIGMAS * math.sqrt(chance * (1 - chance) / count)
    given = given_labels(trained, batch) if labels else None
    accuracy = max(
        _accuracy(trained.forward(batch.ids, labels=given, use_cache=False, train=train_mode).logits, batch.targets)
        for train_mode in (False, True)
    )
    steps = len(training.losses[index])
    ctx.note(
        f"{accuracy:.1%} of {count} unguessable tokens after {steps} steps; chance is {chance:.0%} ({training.mode})"
    )
    if accuracy > allowed:
        where, hint = _leak(trained, batch.ids, batch.targets, allowed)
        ctx.within(
            accuracy, allowed, f"the model predicts tokens that cannot be known: after {steps} steps {accuracy:.1%} of "
            f"held-out random tokens are right, chance is {chance:.0%}: the label leaks into the prediction",
            where=where, hint=hint,
        )  # fmt: skip
    ctx.within(accuracy, allowed, "accuracy on unguessable tokens")


def _leak(trained: Specimen, ids: Tensor, targets: Tensor, allowed: float) -> tuple[str, str]:
    """Through which way the label comes in: the tokens to the right (in train mode alone, too), or the labels given."""
    right = sum(
        int((trained.logits(ids[:, : end + 1])[:, -1].argmax(-1) == targets[:, end]).sum())
        for end in range(ids.shape[1] - 1)
    )
    prefix = right / max(1, int((targets >= 0).sum()))
    shown = {train: _accuracy(trained.logits(ids, train=train), targets) for train in (False, True)}
    where = (
        f"right without labels {shown[False]:.1%}, in train mode {shown[True]:.1%}, from the prefix alone {prefix:.1%}"
    )
    if max(shown.values()) <= allowed:
        return where, Hint(
            "the labels themselves enter the logits: forward(labels=...) mixes them into the input (decoder inputs, "
            "teacher forcing) without shifting them",
            "training.label_leak",
        )
    if prefix > allowed:
        return where, Hint("something that is kept between calls tells the model its answers", "state.carried_over")
    if shown[False] <= allowed:
        return where, Hint(
            "in train mode alone attention sees the tokens that are to be predicted: the causal mask is not applied "
            "there (a fast path, is_causal lost); causality.train_mode shows where",
            "mask.train_only",
        )
    return where, Hint(
        "attention sees the tokens that are to be predicted: no causal mask, an inverted one, or one that is not "
        "applied; validation figures of such a model mean nothing, and it generates badly. "
        "causality.no_future_leak shows where",
        "mask.missing",
        "mask.off_by_one",
        "mask.inverted",
    )


def _accuracy(logits: Tensor, targets: Tensor) -> float:
    counted = targets >= 0
    return float((logits.argmax(-1) == targets)[counted].double().mean())


def _random_rows(subject: Specimen, ctx: Context, drawn: list[int], rows: int, time: int) -> Batches:
    import torch

    from lmconform.sweep.batches import Batch, next_token

    made: dict[int, Batch] = {}

    def batch(step: int, seed: int) -> Batch:
        if step not in made:
            made.clear()
            index = torch.randint(len(drawn), (rows, time), generator=ctx.generator(22, rows, step))
            made[step] = next_token(torch.tensor(drawn)[index].to(subject.device))
        return made[step]

    return batch
