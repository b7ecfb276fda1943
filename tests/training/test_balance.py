"""The balanced loss: a gradient wherever the prediction is too sharp, none where it is right, micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.training.balance import BalancedLoss, share_divergence

VOCAB, EOS = 13, 3


def drawn(seed: int = 0, batch: int = 4, time: int = 9) -> tuple[Tensor, Tensor]:
    """Logits and labels [batch, time], a third of them -100 and some EOS."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, time, VOCAB, generator=generator)
    labels = torch.randint(0, 6, (batch, time), generator=generator)
    labels[:, -1] = EOS
    labels[0, 3:] = -100
    return logits, labels


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, [logits])
    return found


class TestShareDivergence:
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2, 4])
    shares = torch.bincount(labels, minlength=VOCAB) / 8

    def test_it_is_the_divergence_of_the_shares_from_the_mean_prediction(self) -> None:
        logits = torch.randn(8, VOCAB)
        mean, there = logits.softmax(-1).mean(0), self.shares > 0
        expected = (self.shares[there] * (self.shares[there] / mean[there]).log()).sum()
        torch.testing.assert_close(share_divergence(logits, self.labels), expected)

    def test_nothing_is_asked_where_the_shares_are_right(self) -> None:
        logits = F.one_hot(self.labels, VOCAB).float().mul(60).requires_grad_()
        value = share_divergence(logits, self.labels)
        assert abs(value.item()) < 1e-6
        assert gradient(value, logits).abs().max() < 1e-7

    @pytest.mark.parametrize("excess", [2.0, 8.0, 30.0, 80.0])
    def test_the_gradient_grows_with_the_collapse(self, excess: float) -> None:
        """All rows alike: it is (p - q) / n, whatever the distance; the entropy's own gradient has died by then."""
        logits = torch.zeros(8, VOCAB)
        logits[:, 7] = excess
        logits.requires_grad_()
        expected = (logits.softmax(-1) - self.shares) / 8
        torch.testing.assert_close(gradient(share_divergence(logits, self.labels), logits), expected.detach())
        if excess >= 30:
            mean = logits.softmax(-1).mean(0)
            entropy = -(mean * (mean + 1e-10).log()).sum()
            assert gradient(entropy, logits).abs().max() < 1e-9

    @pytest.mark.parametrize("seed", range(20))
    def test_it_never_exceeds_cross_entropy(self, seed: int) -> None:
        torch.manual_seed(seed)
        logits, labels = 5 * torch.randn(30, VOCAB), torch.randint(VOCAB, (30,))
        assert 0 <= float(share_divergence(logits, labels)) <= float(F.cross_entropy(logits, labels))


class TestBalancedLoss:
    def test_without_factors_it_is_the_models_own_loss(self) -> None:
        logits, labels = drawn()
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(BalancedLoss().of(logits, labels), expected)

    def test_eos_counts_as_often_as_it_is_told(self) -> None:
        logits, labels = drawn()
        weight = torch.ones(VOCAB)
        weight[EOS] = 0.25
        flat, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        expected = F.cross_entropy(flat, wanted, weight=weight, reduction="sum") / (wanted != -100).sum()
        torch.testing.assert_close(BalancedLoss(eos_weight=0.25, eos_token_id=EOS).of(logits, labels), expected)

    def test_smoothing_goes_with_it(self) -> None:
        logits, labels = drawn()
        flat, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        expected = F.cross_entropy(flat, wanted, label_smoothing=0.1)
        torch.testing.assert_close(BalancedLoss(label_smoothing=0.1).of(logits, labels), expected)

    @pytest.mark.parametrize("balance", [0.0, 0.7])
    def test_micro_batches_add_up(self, balance: float) -> None:
        """To the sum of their own terms, each by its number of labels, over the labels of the whole step."""
        loss = BalancedLoss(balance=balance, eos_weight=2.0, eos_token_id=EOS)
        logits, labels = drawn()
        items = int((labels[:, 1:] != -100).sum())
        parts = [(logits[rows], labels[rows]) for rows in (slice(0, 1), slice(1, 4))]
        total = sum(loss.of(*part, items) for part in parts)
        counts = [int((part[1][:, 1:] != -100).sum()) for part in parts]
        expected = sum(loss.of(*part) * count for part, count in zip(parts, counts)) / items
        torch.testing.assert_close(total, expected)
        if not balance:
            torch.testing.assert_close(total, loss.of(logits, labels))

    def test_no_label_is_no_loss(self) -> None:
        logits = torch.randn(2, 5, VOCAB, requires_grad=True)
        value = BalancedLoss(balance=1.0).of(logits, torch.full((2, 5), -100))
        assert float(value) == 0
        assert gradient(value, logits).abs().max() == 0

    @pytest.mark.parametrize("wrap", [lambda logits: {"logits": logits}, lambda logits: _Output(logits)])
    def test_the_trainer_can_call_it(self, wrap: Any) -> None:
        logits, labels = drawn()
        loss = BalancedLoss(balance=0.5)
        torch.testing.assert_close(loss(wrap(logits), labels, num_items_in_batch=7), loss.of(logits, labels, 7))

    @pytest.mark.parametrize(
        ("factors", "says"),
        [({"balance": -1.0}, "factors from 0"), ({"eos_weight": 2.0}, "give eos_token_id")],
    )
    def test_misuse_is_refused(self, factors: dict[str, float], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            BalancedLoss(**factors)  # type: ignore[arg-type]


class _Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_a_collapsed_head_is_turned_faster() -> None:
    """From a bias that says one token everywhere: steps until the mean prediction holds it below 10 %."""

    def steps(loss: BalancedLoss) -> int:
        _, labels = drawn(batch=16)
        bias = torch.zeros(VOCAB)
        bias[7] = 12.0
        bias.requires_grad_()
        optimizer = torch.optim.SGD([bias], lr=1.0)
        for step in range(200):
            if float(bias.softmax(0)[7].detach()) < 0.1:
                return step
            optimizer.zero_grad()
            loss.of(bias.expand(16, 9, VOCAB), labels).backward()
            optimizer.step()
        return 200

    assert steps(BalancedLoss(balance=1.0)) < 0.6 * steps(BalancedLoss()) < 120
