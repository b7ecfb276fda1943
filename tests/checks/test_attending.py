"""Attention is seen in whatever way it is written, and not where there is none: no mask is blamed there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.planting import around
from fixtures.subjects import NINE, build
from fixtures.subjects.fading import AllAtOnce, DataDecides, DecayingState, Fading, SteepBias
from fixtures.subjects.ports import PORTS
from lmconform import Subject, check_model
from lmconform.measuring.attending import may_attend
from lmconform.registry import get_check
from lmconform.runner import Runner

FORMS = {
    "decaying_state": functools.partial(Fading, DecayingState),
    "data_decides": functools.partial(Fading, DataDecides),
    "all_at_once": functools.partial(Fading, AllAtOnce),
    "steep_bias": functools.partial(Fading, SteepBias),
}
HOSTS: dict[str, Callable[[], nn.Module]] = {
    **{name: functools.partial(build, name) for name in ("plain", *NINE)},
    **PORTS,
    **FORMS,
}
WITHOUT = {"mamba", "recurrent", "decaying_state", "data_decides"}


@pytest.mark.parametrize("host", HOSTS)
def test_attention_is_told_from_none(host: str) -> None:
    assert may_attend(Subject(HOSTS[host], name=host).open()) == (host not in WITHOUT)


class OfAnotherLibrary(nn.Module):
    """Attention that torch sees nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        array = x.detach().numpy()
        return torch.from_numpy(array.cumsum(1)).to(x)


def test_what_torch_does_not_see_may_be_attention() -> None:
    model = Fading(DecayingState)
    model.layers[1].mixer = OfAnotherLibrary()
    subject = Subject(lambda: model).open()
    assert may_attend(subject)
    assert may_attend(subject, [model.layers[1]])
    assert not may_attend(subject, [model.layers[0]])


def test_a_recurrence_that_is_cut_is_not_laid_to_a_mask() -> None:
    def carried(original: Callable[..., Tensor], state: Tensor, log_decay: Tensor, time: int) -> Tensor:
        return original(state, log_decay, time) * (time % 24 > 0)

    def cleared() -> nn.Module:
        model = Fading(DecayingState, 0.5, 0.9)
        around(model.layers[1].mixer, carried, "carried")
        return model

    report = check_model(Subject(cleared), deselect=["training", "collapse"])
    (red,) = [result for result in report.results if result.status == "failed"]
    assert red.id == "positions.reach"
    assert "the block has no attention" in red.message
    assert red.suspects == ()
    assert not [cause.id for cause in report.causes if cause.id.startswith("mask.")]


def test_a_hybrids_attention_is_blamed_for_itself() -> None:
    """Half of the layers are recurrent: what is said of a layer is what that layer is."""

    def bias(original: Callable[..., Tensor], distance: Tensor) -> Tensor:
        return original(distance).masked_fill(distance >= 8, float("-inf"))

    def built() -> nn.Module:
        model = Fading(DecayingState, 0.5, 0.9)
        model.layers[1].mixer = SteepBias(48, 0.5, 0.9)
        around(model.layers[1].mixer, bias, "bias")
        return model

    result = Runner(Subject(built).open(), shrink=False).run(get_check("positions.reach"))
    assert result.status == "failed"
    assert "block 1" in result.where
    assert result.suspects == ("mask.window",)


def test_a_model_that_cannot_be_watched_may_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any) -> Tensor:
        raise NotImplementedError("no function mode, please")

    subject = Subject(lambda: Fading(DecayingState)).open()
    monkeypatch.setattr(subject, "logits", refuses)
    assert may_attend(subject)
