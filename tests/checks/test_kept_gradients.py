"""A model that keeps the memory of its gradients is sound, and what two backward passes leave there is still told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fixtures.faults import all_faults
from fixtures.subjects import build
from fixtures.subjects.kept_gradients import KeptGradients
from lmconform import Subject, check_model
from lmconform.checks import gradients
from lmconform.diagnosis import diagnose
from lmconform.registry import get_check
from lmconform.runner import Runner

FAULTS = {fault.id: fault for fault in all_faults()}


def kept() -> nn.Module:
    model = build("plain")
    model.__class__ = KeptGradients
    return model


def test_backward_does_add_to_the_same_memory() -> None:
    model, places = kept(), []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
        places.append({name: p.grad.data_ptr() for name, p in model.named_parameters()})
    assert places[0] == places[1]


def test_it_conforms() -> None:
    report = check_model(Subject(kept), deselect=["training", "collapse"])
    red = [result for result in report.results if result.status not in ("passed", "not_applicable")]
    assert [f"{result.id}: {result.message}" for result in red] == []


@pytest.mark.parametrize("id", ["gradients.other_beside_frozen", "gradients.other_beside_frozen_kept"])
def test_what_freezing_changes_is_laid_to_backward(id: str) -> None:
    runner = Runner(FAULTS[id].open(), shrink=False)
    result = runner.run(get_check("gradients.reach"))
    assert result.where == "blocks.1.feed_forward.up.bias"
    assert diagnose([result], runner)[0].id == "grad.wrong"


@pytest.mark.parametrize(("build_one", "passes"), [(lambda: build("plain"), 2), (kept, 4)], ids=["own", "kept"])
def test_only_kept_memory_costs_more_passes(build_one: type, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    backward = gradients.projected_gradients
    monkeypatch.setattr(gradients, "projected_gradients", lambda *args: made.append(1) or backward(*args))
    result = Runner(Subject(build_one).open(), shrink=False).run(get_check("gradients.reach"))
    assert result.status == "passed", result.message
    assert len(made) == passes
