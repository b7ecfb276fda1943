"""Where half precision is not borne, the probe names the lines that must compute in float32."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures.faults import all_faults
from fixtures.subjects import build
from lmconform import Subject
from lmconform.diagnosis import diagnose
from lmconform.diagnosis.probes import half_types
from lmconform.diagnosis.probes.in_float32 import Sites, in_float32, noted
from lmconform.measuring.rounding import in_type
from lmconform.registry import get_check
from lmconform.results import Cause
from lmconform.runner import Runner
from lmconform.specimen import Specimen

FAULTS = {fault.id: fault for fault in all_faults()}
WIDTH = 32


def named(specimen: Specimen, check: str = "precision.bfloat16") -> Cause:
    runner = Runner(specimen, profile="smoke", shrink=False)
    result = runner.run(get_check(check))
    assert result.status == "failed", result.message
    return diagnose([result], runner)[0]


class Mixed(nn.Module):
    """An embedding, what `mix` makes of it [batch, time, WIDTH] beside it, and a head."""

    def __init__(self, mix: Callable[[Mixed, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.embedding = nn.Embedding(61, WIDTH)
        self.gate, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 61)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return self.head(self.norms[1](x + self.mix(self, self.norms[0](x))))


def mixed(mix: Callable[[Mixed, Tensor], Tensor]) -> Specimen:
    def made() -> Mixed:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Mixed(mix)

    return Subject(made).open()


def scanned(model: Mixed, x: Tensor) -> Tensor:
    """The parallel scan of minGRU in log space (Feng et al. 2024)."""
    gate = model.gate(x)
    added = F.softplus(model.value(x)).log() - F.softplus(-gate)
    faded = (-F.softplus(gate)).cumsum(1)
    return (faded + torch.logcumsumexp(added - faded, 1)).exp()


def summed_in_place(model: Mixed, x: Tensor) -> Tensor:
    """The mean so far of positive numbers, in a state that is written into."""
    risen = model.value(x) + 40.0
    state, means = torch.zeros_like(risen[:, 0]), torch.zeros_like(risen)
    for step in range(x.shape[1]):
        state += risen[:, step]
        means[:, step] = state / (step + 1) - 40.0
    return means


def weighed_by_hand(model: Mixed, x: Tensor) -> Tensor:
    """Softmax's weights over the earlier tokens, divided by a sum that is taken token by token."""
    risen = (model.gate(x).tanh() + 6.0).exp()
    total, weighed, mixed = torch.zeros_like(risen[:, 0]), torch.zeros_like(risen[:, 0]), []
    for step in range(x.shape[1]):
        total = total + risen[:, step]
        weighed = weighed + risen[:, step] * (model.value(x)[:, step] + 8.0)
        mixed.append(weighed / total - 8.0)
    return torch.stack(mixed, 1)


def turning(model: Mixed, x: Tensor) -> Tensor:
    """Sines of positions whose angles are made in the type of the activations."""
    positions = torch.arange(x.shape[1], device=x.device).to(x.dtype)
    angles = positions[:, None] * torch.linspace(1.0, 3.0, WIDTH, device=x.device).to(x.dtype)
    return angles.sin().expand_as(x) + model.value(x) / 8


@pytest.mark.parametrize(
    ("mix", "cause", "where"),
    [
        (scanned, "dtype.low_precision", r"from Tensor\.cumsum \(\S+\) to Tensor\.(add|exp) \(\S+\), the drift"),
        (summed_in_place, "dtype.low_precision", r"from Tensor\.add \(\S+\) to Tensor\.sub \(\S+\), the drift"),
        (weighed_by_hand, "dtype.low_precision", r"from Tensor\.add \(\S+\) to Tensor\.(div|sub) \(\S+\), the drift"),
        (turning, "position.low_precision", r"from Tensor\.to \(\S+\) to Tensor\.sin \(\S+\), the drift"),
    ],
    ids=["scan", "state_written_in_place", "sums_of_weights", "angles"],
)
def test_the_lines_that_drift_are_named(mix: Callable[[Mixed, Tensor], Tensor], cause: str, where: str) -> None:
    found = named(mixed(mix))
    assert found.id == cause
    assert re.search(where, found.where), found.where
    first, last = mix.__code__.co_firstlineno, max(line for *_, line in mix.__code__.co_lines() if line)
    lines = [int(line) for line in re.findall(r"test_half_types\.py:(\d+)", found.where)]
    assert lines
    assert all(first < line <= last for line in lines)


@pytest.mark.parametrize(
    ("id", "where"),
    [
        ("precision.state_in_half", r"from Tensor\.add \(precision\.py:\d+\) to Tensor\.sub"),
        ("precision.window_by_difference", r"from Tensor\.cumsum \(precision\.py:\d+\) to Tensor\.sub"),
        ("precision.variance_by_moments", r"to Tensor\.sub \(precision\.py:\d+\)"),
        ("precision.decays_summed_in_half", r"from Tensor\.cumsum \(precision\.py:\d+\) to Tensor\.sub"),
    ],
)
def test_planted_sums_in_half_are_named_first(id: str, where: str) -> None:
    found = named(FAULTS[id].open())
    assert found.id == "dtype.low_precision"
    assert re.search(where, found.where), found.where


@pytest.mark.parametrize("name", ["plain", "llama"])
def test_of_a_sound_model_nothing_is_said(name: str) -> None:
    assert half_types.probe(Subject(lambda: build(name)).open(), 0) == []


def test_of_an_overflow_nothing_is_said() -> None:
    assert half_types.probe(FAULTS["precision.power_overflows"].open(), 0) == []


@pytest.mark.parametrize("name", ["plain", "recurrent", "multihead", "latent", "mamba", "ported_llama"])
def test_with_all_lines_chosen_it_computes_in_float32_and_with_none_as_ever(name: str) -> None:
    subject = Subject(lambda: build(name)).open()
    half = in_type(subject, torch.bfloat16)
    ids = subject.probe_ids(2, 16)
    sites = Sites(torch.bfloat16)
    with noted(sites):
        as_ever = half.logits(ids)
    single = in_type(half, torch.float32).logits(ids)
    count = len(sites.calls)
    computed = {}
    for part in (range(0), range(count // 2), range(count // 2, count), range(count)):
        with in_float32(part, sites):
            computed[part] = half.logits(ids)
    assert torch.equal(computed[range(0)], as_ever)
    torch.testing.assert_close(computed[range(count)].float(), single, rtol=1e-4, atol=1e-4)
    errors = [float((made.float() - single).abs().mean()) for made in computed.values()]
    assert max(errors) == errors[0] > 1e-3


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [("torch.zeros_like", "torch.zeros_like", 256), ("Tensor.add_", "Tensor.mul", 300)],
    ids=["made", "written"],
)
def test_a_state_is_wide_where_its_writing_is_chosen_not_its_making(first: str, last: str, expected: int) -> None:
    def count() -> Tensor:
        ones = torch.ones(1, 300, dtype=torch.bfloat16)  # which counts by ones to 256
        state = torch.zeros_like(ones[:, 0])
        for step in range(300):
            state.add_(ones[:, step])
        return state.mul(1)

    sites = Sites(torch.bfloat16)
    with noted(sites):
        as_ever = count()
    assert as_ever.item() == 256
    calls = [call.partition(" ")[0] for call in sites.calls.values()]
    with in_float32(range(calls.index(first), calls.index(last) + 1), sites):
        made = count()
    assert made.item() == expected
