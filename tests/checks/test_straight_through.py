"""A rounding that says itself what gradient goes through it has no derivative to be compared with."""

from __future__ import annotations

from typing import Any

import pytest
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


class WithoutGrad(Ternary):
    """The rounding is done where no gradient is kept."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            size = self.weight.abs().mean().clamp(min=1e-5)
            off = (self.weight / size).round().clamp(-1, 1) * size - self.weight
        return F.linear(x, self.weight + off, self.bias)


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        size = weight.abs().mean().clamp(min=1e-5)
        return (weight / size).round().clamp(-1, 1) * size

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class ByFunction(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, Rounding.apply(self.weight), self.bias)


class PerChannel(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.detach().abs().amax(1) / 7
        zeros = torch.zeros(len(scale), dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(self.weight.float(), scale.float(), zeros, 0, -8, 7)
        return F.linear(x, weight.to(x.dtype), self.bias)


class Halved(nn.Linear):
    """The gradient of half the product is cut off, and nothing is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2 + super().forward(x).detach() / 2


def with_layers(kind: type[nn.Linear]) -> nn.Module:
    model = build("plain", 0)
    for block in model.blocks:
        block.feed_forward.up.__class__ = kind
    return model


def halved() -> nn.Module:
    return with_layers(Halved)


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (Ternary, "Tensor.round (test_straight_through.py:"),
        (WithoutGrad, "Tensor.round (test_straight_through.py:"),
        (ByFunction, "Tensor.round (test_straight_through.py:"),
        (PerChannel, "fake_quantize_per_channel_affine"),
    ],
)
def test_it_does_not_apply_and_names_the_line(kind: type[nn.Linear], call: str) -> None:
    report = check_model(lambda: with_layers(kind), select=["gradients.correct", "gradients.reach"])
    correct = next(result for result in report.results if result.id == "gradients.correct")
    assert correct.status == "not_applicable"
    assert call in correct.message
    assert report.ok, report.failed


def routed() -> nn.Module:
    """Experts are chosen and counted by whole numbers, which are choices and no roundings."""
    return build("ported_experts", 0)


def test_a_choice_of_experts_is_no_rounding() -> None:
    report = check_model(routed, select=["gradients.correct"])
    assert "rounds" not in report.results[0].message


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


@pytest.mark.parametrize("seed", range(4))
def test_a_half_type_is_not_blamed_for_steps(seed: int) -> None:
    """Numbers near a step fall on either side of it in any type; which seeds show it is chance."""
    report = check_model(lambda: with_layers(Ternary), select=["precision.bfloat16", "precision.float16"], seed=seed)
    assert report.ok, report.failed
