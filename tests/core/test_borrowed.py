"""A large model is copied without its weights: what is changed is made layer by layer, and let go."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from fixtures.faults import Fault, all_faults
from fixtures.subjects import SOUND, build
from lmconform import Subject, check_model, specimen, tolerance
from lmconform.borrowed import borrowed

FAULTS = ("causality.tril_plus_one", "causality.adds_minus_10000", "cache.values_in_half", "padding.mask_inverted")


@pytest.mark.parametrize("name", SOUND)
def test_it_computes_what_a_whole_copy_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Subject(lambda: build(name)).open()
    ids = whole.probe_ids(2, 24)
    copies = whole.twin(), whole.scaled(3.0)
    monkeypatch.setattr(specimen, "LARGE", 0)
    large = Subject(lambda: build(name)).open()
    for copied, lent in zip(copies, (large.twin(), large.scaled(3.0))):
        assert (copied is None) == (lent is None)  # Mamba's own code does not run in float64
        if copied is not None and lent is not None:
            expected = copied.logits(ids)  # matrix products may take another path where weights lie otherwise in memory
            assert float((lent.logits(ids) - expected).abs().max()) <= tolerance.allowed(0.0, expected)


def test_no_more_than_one_layer_is_held_at_a_time() -> None:
    model = build("llama").eval()
    alive: set[int] = set()
    most = 0

    def change(name: str, weight: Tensor) -> Tensor:
        nonlocal most
        made = weight.double()
        alive.add(id(made))
        sizes[id(made)] = made.numel()
        weakref.finalize(made, alive.discard, id(made))
        most = max(most, sum(sizes[one] for one in alive))
        return made

    sizes: dict[int, int] = {}
    lent = borrowed(model, change)
    with torch.no_grad():
        lent(torch.arange(12)[None] + 3)
    layers = [sum(weight.numel() for weight in layer.parameters()) for layer in model.model.layers]
    assert most <= max(*layers, *(weight.numel() for weight in model.parameters()))
    assert not alive


def test_the_weights_are_shared_and_as_before() -> None:
    model = build("gpt2").eval()
    before = copy.deepcopy(model.state_dict())
    lent = borrowed(model, lambda name, weight: weight * 2)
    with torch.no_grad():
        lent(torch.arange(12)[None] + 3)
    ours = dict(lent.named_parameters())
    assert all(ours[name].data_ptr() == weight.data_ptr() for name, weight in model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.table(ids)
        for layer in self.layers:
            states = layer(states[..., :3])
        return states


def test_a_forward_that_raises_gives_the_weights_back() -> None:
    model = Raising()
    lent = borrowed(model, lambda name, weight: weight * 2)
    with pytest.raises(RuntimeError, match="shapes"):
        lent(torch.tensor([[1, 2]]))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), lent.parameters()))


class Repeating(Raising):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)] * 3)

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.table(ids)
        for layer in self.layers:
            states = layer(states)
        return states


def test_a_block_that_is_used_several_times_is_changed_once() -> None:
    model = Repeating()
    whole = copy.deepcopy(model)
    with torch.no_grad():
        for weight in whole.parameters():
            weight.mul_(2)
    ids = torch.tensor([[1, 2]])
    lent = borrowed(model, lambda name, weight: weight * 2)
    assert torch.equal(lent(ids), whole(ids))


def test_a_hook_that_raises_leaves_the_next_call_right() -> None:
    model = Repeating()
    ids = torch.tensor([[1, 2]])
    failing = [True]

    def hook(module: nn.Module, inputs: object) -> None:
        if failing.pop():
            raise ValueError

    model.layers[0].register_forward_pre_hook(hook)
    lent = borrowed(model, lambda name, weight: weight * 2)
    with pytest.raises(ValueError):
        lent(ids)
    failing[:] = [False] * 6
    assert torch.equal(lent(ids), lent(ids))


def test_loans_of_loans_go_one_behind_the_other() -> None:
    model = build("plain").eval()
    ids = torch.arange(12)[None] + 3
    twice = borrowed(
        borrowed(model, lambda name, weight: weight * 2), lambda name, weight: weight + (weight.abs() > 0.1)
    )
    whole = copy.deepcopy(model)
    with torch.no_grad():
        for weight in whole.parameters():
            doubled = weight * 2
            weight.copy_(doubled + (doubled.abs() > 0.1))
        for _ in range(2):
            assert torch.equal(logits(twice, ids), logits(whole, ids))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    given = model(ids)
    return given if isinstance(given, Tensor) else given.logits


@pytest.mark.parametrize("fault", [fault for fault in all_faults() if fault.id in FAULTS], ids=lambda fault: fault.id)
def test_faults_are_seen_in_a_large_model_too(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specimen, "LARGE", 0)
    report = check_model(fault.subject(), select=[fault.kills[0]])
    assert fault.kills[0] in [result.id for result in report.results if result.status == "failed"]


@pytest.mark.parametrize(
    ("name", "profile"), [("plain", "default"), ("gpt2", "smoke"), ("llama", "smoke"), ("mixtral", "smoke")]
)
def test_verdicts_are_those_of_a_small_model(name: str, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = []
    for large in (specimen.LARGE, 0):
        monkeypatch.setattr(specimen, "LARGE", large)
        subject = Subject(lambda: build(name, torch.initial_seed() % (1 << 31)), name=name)
        report = check_model(subject, profile=profile, deselect=["training", "collapse"])
        verdicts.append({result.id: result.status for result in report.results})
    assert verdicts[0] == verdicts[1]
    assert "failed" not in verdicts[0].values()
