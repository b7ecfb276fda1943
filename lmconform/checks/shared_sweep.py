"""The one learning-rate sweep of a subject that the training and collapse checks share."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmconform.sweep.corpus import sentence
from lmconform.sweep.rates import Outcome, outcome, spaced

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen
    from lmconform.sweep.members import Training

RATES = (1e-5, 1e-1)
STEPS = 100
MEMORISED = 0.1  # the loss under which a sentence counts as known
ENOUGH = 0.01  # and the one from which there is nothing left to see
LEARNT = 0.5  # of the first loss: below it a rate has learnt something
SIZES = {"smoke": 2_000_000, "default": 2_000_000, "thorough": 50_000_000}  # parameters that are trained many times
FASTER = 20  # so many more on an accelerator
USUAL = 3e-3  # where no rate learnt


@dataclass(frozen=True)
class Swept:
    """One sentence [1, time], learnt at many rates."""

    sentence: Tensor
    training: Training
    outcome: Outcome

    @property
    def best(self) -> int:
        """The member whose loss ended lowest, the fastest of several."""

        def rank(index: int) -> tuple[float, int]:
            losses = self.training.losses[index]
            return (float("inf") if self.training.diverged[index] else max(losses[-1], ENOUGH), len(losses))

        return min(range(len(self.training.members)), key=rank)


_swept: weakref.WeakKeyDictionary[Specimen, dict[tuple[int, str], Swept]] = weakref.WeakKeyDictionary()


def swept(subject: Specimen, ctx: Context) -> Swept:
    """The subject's sweep, made once for each seed: fresh weights, 9 rates (thorough: 13, of 3 seeds), 100 steps.

    Raises Unavailable where the model is too large to be trained many times in a check.
    """
    from lmconform.sweep.batches import next_token
    from lmconform.sweep.members import Member, train

    trainable_size(subject, ctx)
    kept = _swept.setdefault(subject, {})
    key = (ctx.seed, ctx.profile)
    if key not in kept:
        thorough = ctx.profile == "thorough"
        members = [
            Member(rate, ctx.seed + seed)
            for rate in spaced(*RATES, 13 if thorough else 9)
            for seed in range(3 if thorough else 1)
        ]
        ids = sentence(subject, ctx.seed)
        batch = next_token(ids)
        training = train(subject, members, lambda step, seed: batch, STEPS, done_below=ENOUGH)
        start = max(losses[0] for losses in training.losses)
        kept[key] = Swept(ids, training, outcome(training, STEPS, LEARNT * start))
    return kept[key]


def good_rate(subject: Specimen, ctx: Context) -> float:
    """The recommended rate of the sweep; a usual one where none learnt."""
    return swept(subject, ctx).outcome.recommended or USUAL


def trainable_size(subject: Specimen, ctx: Context) -> int:
    """The number of trained parameters. Raises Unavailable where there are none, or too many for a check."""
    size = sum(p.numel() for p in subject.module.parameters() if p.requires_grad)
    limit = SIZES.get(ctx.profile, SIZES["default"]) * (1 if subject.device.type == "cpu" else FASTER)
    if not size:
        ctx.not_applicable("no parameter requires a gradient")
    if size > limit:
        ctx.not_applicable(
            f"{size / 1e6:.0f} M parameters are too many to be trained over and over in a check (the "
            f"{ctx.profile} profile takes {limit / 1e6:.0f} M here): check a smaller configuration of the same code, "
            "or run lmconform sweep"
        )
    return size
