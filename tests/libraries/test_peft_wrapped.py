"""A model that peft has wrapped is a subject like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from fixtures.subjects import build
from lmconform import check_model

peft = pytest.importorskip("peft")


def wrapped() -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(build("llama", 0), config)


def forgets_a_layer(model: Any) -> None:
    """The last layer's adapter is not among what is saved."""
    original = model.save_pretrained

    def save_pretrained(folder: str, **options: Any) -> None:
        state = {k: v for k, v in peft.get_peft_model_state_dict(model).items() if "layers.0." in k}
        original(folder, state_dict=state, **options)

    model.save_pretrained = save_pretrained


def test_it_conforms() -> None:
    report = check_model(wrapped)
    assert report.ok, [(result.id, result.message) for result in report.failed]
    of_the_base = {result.id for result in report.results if result.message.endswith("check the base model")}
    assert of_the_base == {"training.memorize", "training.uses_context", "training.lr_sweep", "persistence.meta"}


def two_active() -> nn.Module:
    model = wrapped()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    return model


def of_two_kinds() -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(build("llama", 0), config, mixed=True)


@pytest.mark.parametrize("made", [two_active, of_two_kinds])
def test_however_many_adapters_are_active_they_come_back(made: Callable[[], nn.Module]) -> None:
    report = check_model(made, select=["persistence.round_trip", "persistence.copy", "scale.attention"])
    assert report.ok, [(result.id, result.message) for result in report.failed]


def test_an_adapter_that_is_not_saved_is_missed() -> None:
    def build_and_forget() -> nn.Module:
        model = wrapped()
        forgets_a_layer(model)
        return model

    report = check_model(build_and_forget, select=["persistence.round_trip"])
    assert [result.id for result in report.failed] == ["persistence.round_trip"]
    assert "saving the adapters" in report.failed[0].message
