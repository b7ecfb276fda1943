"""A recorded step is the step: the same numbers bit for bit, or it is refused and said why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fixtures.subjects import build
from lmconform import Subject
from lmconform.measuring.dropout import without_dropout
from lmconform.sweep import stepping
from lmconform.sweep.batches import cross_entropy, next_token
from lmconform.sweep.corpus import rule_corpus, sentence
from lmconform.sweep.members import Member, Training, train
from lmconform.sweep.recording import Unrecordable, record
from lmconform.sweep.stacking import vectorisable

STEPS = 12


def trained(name: str, monkeypatch: pytest.MonkeyPatch, worth: int, **options: Any) -> Training:
    monkeypatch.setattr(stepping, "WORTH", worth)
    specimen = Subject(lambda: build(name, torch.initial_seed() % (1 << 31)), name=name).open()
    members = [Member(rate, seed) for rate in (1e-4, 3e-3, 1e-1) for seed in (0, 1)]
    return train(specimen, members, rule_corpus(specimen).batches(specimen, 1, 12), STEPS, **options)


@pytest.mark.parametrize("name", ["plain", "gpt2", "llama", "gemma2", "mamba"])
def test_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = trained(name, monkeypatch, worth=2)
    plain = trained(name, monkeypatch, worth=10**9)
    assert recorded.losses == plain.losses
    for mine, theirs in zip(recorded.weights, plain.weights, strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["plain", "gpt2", "llama", "gemma2", "mamba"])
def test_is_used(name: str) -> None:
    specimen = Subject(lambda: build(name, 0), name=name).open()
    batch = next_token(sentence(specimen, 0))
    run, reason = vectorisable(specimen, without_dropout(specimen.fresh(0)), batch, cross_entropy, False)
    assert run is not None, reason
    assert run.layout is not None
    flat = run.layout.stacked([specimen.module] * 2)
    taken = stepping.Stepping(run)
    for _ in range(2):
        taken.step(flat, torch.empty_like(flat), batch.ids, batch.targets, True, 100)
        flat += 1e-3
    gradient = torch.empty_like(flat)
    for _ in range(3):
        losses = taken.step(flat, gradient, batch.ids, batch.targets, True, 100)
        flat += 1e-3
    assert (taken.reason, taken.trusted) == ("", True)
    assert len(losses) == 2


def test_members_that_end_leave_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    specimen = Subject(lambda: build("plain", torch.initial_seed() % (1 << 31)), name="plain").open()
    batch = next_token(sentence(specimen, 0))
    members = [Member(rate, 0) for rate in (1e-5, 3e-3, 1e-2, 2e-2, 1e6)]
    made = []
    for worth in (2, 10**9):
        monkeypatch.setattr(stepping, "WORTH", worth)
        made.append(train(specimen, members, lambda step, seed: batch, 60, done_below=0.5))
    lengths = [len(losses) for losses in made[0].losses]
    assert lengths[0] == 60 > lengths[1]
    assert made[0].diverged == [False, False, False, False, True]
    for mine, theirs in zip(made[0].losses[:2], made[1].losses[:2], strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=0, atol=1e-4)


# -- what cannot be recorded -------------------------------------------------------------------------------------------

Body = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def draws(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return x * torch.rand_like(x)


def decides(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return x * 2 if bool(x.sum() > 0) else x * 3


def counts(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    kept.add_(1)
    return x * kept


def picks(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return x[x > 0] * 2


def remembers(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    kept.copy_(x)
    return kept * 2


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (draws, "draws at random"),
        (decides, "decides by values"),
        (counts, "writes to a tensor that outlives the step"),
        (picks, "decides by values"),
        (remembers, "writes to a tensor that outlives the step"),
    ],
)
def test_refused(body: Body, why: str) -> None:
    x, kept = torch.ones(3), torch.ones(3)
    with pytest.raises(Unrecordable, match=why):
        record(lambda: (body(x, kept).sum(), []), [x], [])


def fills(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    made = torch.zeros(3)
    made[1:] = x[:2]  # what is written to later depends on x from the start
    return made.add_(kept) * x


def looks(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    first, second, third = (x * 2).split(1)
    return torch.cat([third, first.clone().mul_(kept[:1]), second.view(1, 1).transpose(0, 1)[0]])


@pytest.mark.parametrize("body", [fills, looks])
def test_recorded(body: Body) -> None:
    x, kept, into = torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 5.0), torch.empty(3)

    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        made = body(x, kept)
        return made.sum(), [made]

    _, again = record(step, [x], [into])
    for _ in range(2):
        x.mul_(-1.5).add_(1)
        losses, made = again(), into.clone()
        assert torch.equal(losses, step()[0])
        assert torch.equal(made, step()[1][0])
