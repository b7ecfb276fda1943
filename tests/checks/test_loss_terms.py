"""loss.terms: sound losses of many kinds hold, or are cross-entropy and nothing else; dead terms are named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fixtures.faults.loss import clamped_diversity, clamped_dominance, counted_tokens, detached_diversity, diversity
from fixtures.recipes import smoothed_loss
from fixtures.subjects import build
from fixtures.tokenizers import EOS
from lmconform import Recipe, Subject
from lmconform.registry import get_check
from lmconform.results import Result
from lmconform.runner import Runner
from models.training.balance import BalancedLoss

Loss = Callable[[Tensor, Tensor], Tensor]
SEEDS = range(2)


def rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(*rows(logits, labels))


def plus(term: Callable[[Tensor], Tensor | float]) -> Loss:
    return lambda logits, labels: plain(logits, labels) + term(logits)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(*rows(logits, labels), reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def divergence(logits: Tensor, labels: Tensor) -> Tensor:
    """Label smoothing as KL divergence: cross-entropy and a constant."""
    flat, wanted = rows(logits, labels)
    target = 0.9 * F.one_hot(wanted, flat.shape[-1]).float() + 0.1 / flat.shape[-1]
    return F.kl_div(flat.log_softmax(-1), target, reduction="none").sum(-1).mean()


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.ones(logits.shape[-1])
    weight[EOS] = 0.3
    return F.cross_entropy(*rows(logits, labels), weight=weight)


NOTHING_ELSE: dict[str, tuple[Loss, float | None]] = {
    "shifted": (plain, None),
    "unshifted": (lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()), None),
    "smoothed as stated": (smoothed_loss, 0.1),
}
SOUND: dict[str, Loss] = {
    "smoothed, not stated": smoothed_loss,
    "smoothed by divergence": divergence,
    "focal": focal,
    "weighted": weighted,
    "constant": plus(lambda logits: 1.0),
    "entropy bonus": plus(lambda logits: -0.1 * diversity(logits)),
    "small entropy bonus": plus(lambda logits: -1e-4 * diversity(logits)),
    "z-loss": plus(lambda logits: 1e-4 * logits.logsumexp(-1).square().mean()),
    "hinge that acts in time": plus(lambda logits: 1.0 + F.relu(2.0 - diversity(logits))),
    "hinge on EOS alone": plus(lambda logits: F.relu(logits.softmax(-1)[..., EOS].mean() - 0.2)),
    "balanced": BalancedLoss(balance=0.5).of,
    "balanced a little, EOS weighed": BalancedLoss(balance=0.01, eos_weight=0.5, eos_token_id=EOS).of,
}
DEAD: dict[str, Loss] = {
    "clamped": plus(clamped_diversity),
    "clamped, labels ready": lambda logits, labels: (
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + clamped_diversity(logits)
    ),
    "detached": plus(detached_diversity),
    "counted": plus(counted_tokens),
    "clamped from above": plus(clamped_dominance),
    "clamped, beside smoothing": lambda logits, labels: smoothed_loss(logits, labels) + clamped_diversity(logits),
}


def run(loss: Loss, seed: int, smoothing: float | None = None) -> Result:
    subject = Subject(lambda: build("plain", seed), recipe=Recipe(loss=loss, label_smoothing=smoothing))
    return Runner(subject.open(seed=seed), profile="smoke", seed=seed).run(get_check("loss.terms"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NOTHING_ELSE)
def test_cross_entropy_has_no_terms(name: str, seed: int) -> None:
    loss, smoothing = NOTHING_ELSE[name]
    result = run(loss, seed, smoothing)
    assert (result.status, result.message) == (
        "not_applicable",
        "the recipe's loss is cross-entropy and nothing else",
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SOUND)
def test_live_terms_hold(name: str, seed: int) -> None:
    result = run(SOUND[name], seed)
    assert result.status == "passed", result.message
    assert (result.margin or 0) < 0.1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", DEAD)
def test_dead_terms_are_named(name: str, seed: int) -> None:
    result = run(DEAD[name], seed, 0.1 if "smoothing" in name else None)
    assert result.status == "failed", result.message
    assert result.suspects == ("loss.term_saturated",)
    assert (result.margin or 0) > 3


def test_a_constant_is_noted() -> None:
    assert "cross-entropy plus a constant, 1" in run(SOUND["constant"], 0).message


def test_a_loss_without_a_gradient_is_named() -> None:
    result = run(lambda logits, labels: plain(logits.detach(), labels), 0)
    assert result.status == "failed"
    assert "carries no gradient" in result.message
