"""A rounding that says itself what gradient goes through it has no derivative to be compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures.subjects import build
from lmconform import check_model


class Ternary(nn.Linear):
    """Weights of -1, 0 and 1 times their mean size, as in BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764)."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.abs().mean().clamp(min=1e-5)
        rounded = (self.weight / size).round().clamp(-1, 1) * size
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


class Halved(nn.Linear):
    """The gradient of half the product is cut off, and nothing is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2 + super().forward(x).detach() / 2


def with_layers(kind: type[nn.Linear]) -> nn.Module:
    model = build("plain", 0)
    for block in model.blocks:
        block.feed_forward.up.__class__ = kind
    return model


def ternary() -> nn.Module:
    return with_layers(Ternary)


def halved() -> nn.Module:
    return with_layers(Halved)


def test_it_does_not_apply_and_names_the_line() -> None:
    report = check_model(ternary, select=["gradients.correct", "gradients.reach"])
    correct = next(result for result in report.results if result.id == "gradients.correct")
    assert correct.status == "not_applicable"
    assert "Tensor.round (test_straight_through.py:" in correct.message
    assert report.ok


def test_what_is_cut_off_without_a_rounding_is_red() -> None:
    report = check_model(halved, select=["gradients.correct"])
    assert [result.status for result in report.results] == ["failed"]


def test_rounding_of_what_is_not_learnt_is_none() -> None:
    """Buckets of distances, as T5's, round numbers that no weight has made."""

    def buckets(module: nn.Module, args: object) -> None:
        torch.arange(8.0).div(3).floor()

    model = build("plain", 0)
    model.blocks[0].register_forward_pre_hook(buckets)
    report = check_model(model, select=["gradients.correct"])
    assert [result.status for result in report.results] == ["passed"]
