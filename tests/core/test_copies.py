"""Copies of a subject are the model, whatever it keeps: complex weights, empty containers that carry something."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from lmconform import BuildError, Subject, check_model, specimen

VOCABULARY, WIDTH = 61, 32


class Rotation(nn.Module):
    """A causal filter over time whose poles are complex: y[t] = sum of Re(b exp(a s)) x[t - s]."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.complex(-torch.rand(WIDTH) - 0.1, math.pi * torch.rand(WIDTH)))
        self.b = nn.Parameter(torch.randn(WIDTH, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        steps = torch.arange(time, device=x.device)
        kernel = (torch.exp(self.a[:, None] * steps) * self.b[:, None]).real
        length = 2 * time  # so that nothing comes round
        wide = x if x.dtype == torch.float64 else x.float()  # there is no transform in half precision
        spectrum = torch.fft.rfft(wide.transpose(1, 2), n=length) * torch.fft.rfft(kernel, n=length)
        return torch.fft.irfft(spectrum, n=length)[..., :time].transpose(1, 2).to(x.dtype)


class Filtered(nn.Module):
    """A language model around it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm, self.mix, self.head = nn.LayerNorm(WIDTH), Rotation(), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        logits: Tensor = self.head(x + self.mix(self.norm(x)))
        return logits


class KeepsItsGradients(Filtered):
    """Its zero_grad() writes zeros into the gradients that are there, as some trainers' models do."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()


class CarriesMetadata(Filtered):
    """Keeps an empty OrderedDict with an attribute, as an empty state_dict() is one."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: OrderedDict[str, Tensor] = nn.Identity().state_dict()

    def forward(self, input_ids: Tensor) -> Tensor:
        assert self.kept._metadata  # type: ignore[attr-defined]
        return super().forward(input_ids)


@pytest.mark.parametrize("model", [Filtered, KeepsItsGradients, CarriesMetadata])
def test_conforms(model: type[nn.Module]) -> None:
    report = check_model(model, profile="default", deselect="training,collapse")
    assert report.failed == []
    assert report.counts["passed"] > 15


@pytest.mark.parametrize(("dtype", "same"), [("float64", torch.complex128), ("bfloat16", torch.complex64)])
def test_complex_weights_keep_their_imaginary_part(dtype: str, same: torch.dtype) -> None:
    subject = Subject(Filtered).open(dtype=dtype)
    for each in (subject, subject.fresh(1), subject.as_loaded(), subject.copy()):
        assert each.module.mix.a.dtype == same
        assert bool(each.module.mix.a.imag.any())


def test_a_large_model_that_its_builder_hands_out_again_is_not_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmconform.checks.scale import _redrawn  # here: checks stand in the order in which their modules came in

    monkeypatch.setattr(specimen, "LARGE", 1000)
    one = Filtered()
    subject = Subject(lambda: one).open()
    before = subject.module.head.weight.clone()
    _redrawn(subject, 0)
    assert torch.equal(subject.module.head.weight, before)


def test_a_module_that_is_handed_out_again_and_cannot_be_copied_is_refused() -> None:
    one = Filtered()
    one.lock = threading.Lock()
    subject = Subject(lambda: one, name="one")
    subject.open(as_loaded=True)
    with pytest.raises(BuildError, match=r"returned before, which cannot be copied .* build a new one each time"):
        subject.open(as_loaded=True)
