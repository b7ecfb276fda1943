"""Losses against collapse: a weight on EOS, and a term that pulls the mean prediction to the labels' own shares.

For any model: logits [batch, time, vocab], labels [batch, time] as transformers has them (shifted here, -100 ignored).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.training.losses import IGNORED


def share_divergence(logits: Tensor, labels: Tensor) -> Tensor:
    """KL(q || p) of the labels' shares q in the batch from the mean prediction p; logits [n, vocab], labels [n].

    Where all rows are alike, as in a collapse, its gradient with respect to one row of logits is (p - q) / n: it grows
    with the collapse. That of an entropy bonus, p (log p + entropy), vanishes as p becomes one-hot; that of a clamped
    one is 0 beyond its clamp. At p = q it is 0 and has no gradient; by Jensen's inequality it never exceeds the
    cross-entropy of one-hot labels. A batch's shares are a sample of the corpus', which makes the term noisy: a healthy
    run learns more slowly with it (docs/quantum.md has figures).
    """
    tokens, counts = labels.unique(return_counts=True)
    share = counts / len(labels)
    # the mean over rows in logarithms: no probability is rounded to 0, none needs a 1e-10
    mean = logits.float().log_softmax(-1)[:, tokens].logsumexp(0) - math.log(len(labels))
    return (share * (share.log() - mean)).sum()


class BalancedLoss:
    """Cross-entropy where EOS counts `eos_weight` times, plus `balance` times `share_divergence`.

    As the Trainer's `compute_loss_func`: (outputs, labels, num_items_in_batch) -> scalar; as a recipe's loss:
    `of(logits, labels)`. Sums are divided by the number of labels (of the whole optimizer step where it is given), not
    by the sum of their weights: with `eos_weight` alone, micro-batches add up to the loss of the whole. The divergence
    does not: it is each micro-batch's own, from fewer labels, so a smaller micro-batch is a noisier term. A weight
    other than 1 moves the frequency of EOS that the model learns.

    Raises ValueError for a negative factor, and for an EOS weight without an EOS token.
    """

    def __init__(
        self,
        *,
        balance: float = 0.0,
        eos_weight: float = 1.0,
        eos_token_id: int | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        if balance < 0 or eos_weight < 0:
            raise ValueError(f"balance {balance:g} and eos_weight {eos_weight:g} are factors from 0")
        if eos_weight != 1 and eos_token_id is None:
            raise ValueError(f"eos_weight {eos_weight:g} needs to know EOS: give eos_token_id")
        self.balance = balance
        self.eos_weight = eos_weight
        self.eos = eos_token_id
        self.label_smoothing = label_smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        return self.of(logits, labels, num_items_in_batch)

    def of(self, logits: Tensor, labels: Tensor, items: Any = None) -> Tensor:
        """The loss, a scalar in float32; `items`: the number of labels to divide by, by default the batch's own."""
        counted = labels[:, 1:] != IGNORED
        rows, wanted = logits[:, :-1][counted], labels[:, 1:][counted]
        if not len(wanted):
            return logits.sum() * 0.0
        each = nn.functional.cross_entropy(rows.float(), wanted, reduction="none", label_smoothing=self.label_smoothing)
        if self.eos is not None:
            each = torch.where(wanted == self.eos, self.eos_weight * each, each)
        total = each.sum()
        if self.balance:
            total = total + self.balance * len(wanted) * share_divergence(rows, wanted)
        return total / (len(wanted) if items is None else items)
