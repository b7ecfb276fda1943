"""What starts at 0 by design lets gradients through after a step and is sound; what stays shut has vanished."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.subjects import build
from fixtures.subjects.plain import Block, PlainGPT, plain
from lmconform import Result, Subject
from lmconform.registry import get_check
from lmconform.runner import Runner

Change = Callable[[PlainGPT], None]


class Gated(Block):
    """Its output is multiplied by a gate that starts at 0: one number (ReZero) or one a channel (LayerScale)."""

    def forward(self, x: Tensor, *rest: Any) -> Any:
        out, present = super().forward(x, *rest)
        return x + self.gate * (out - x), present


class Modulated(Block):
    """adaLN-zero: the gate is a projection of the stream's mean that starts at 0."""

    def forward(self, x: Tensor, *rest: Any) -> Any:
        out, present = super().forward(x, *rest)
        return x + self.gate(x) * (out - x), present


class CutOff(Block):
    def forward(self, x: Tensor, *rest: Any) -> Any:
        out, present = super().forward(x, *rest)
        return x + (out - x) * 1e-8, present


def head(model: PlainGPT) -> None:
    nn.init.zeros_(model.head.weight)


def projections(model: PlainGPT) -> None:
    head(model)
    for block in model.blocks:
        nn.init.zeros_(block.attention.o.weight)
        nn.init.zeros_(block.feed_forward.down.weight)


def gates(kind: type[nn.Module], gate: Callable[[], nn.Module | nn.Parameter]) -> Change:
    def change(model: PlainGPT) -> None:
        head(model)
        for block in model.blocks:
            block.gate = gate()
            block.__class__ = kind

    return change


def modulation() -> nn.Linear:
    made = nn.Linear(48, 48)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made


def frozen(model: PlainGPT) -> None:
    head(model)
    model.head.weight.requires_grad_(False)


def given_nothing(model: PlainGPT) -> None:
    head(model)
    model.head.weight.register_hook(torch.zeros_like)


def last_norm(model: PlainGPT) -> None:
    nn.init.zeros_(model.norm.weight)


def tied(model: PlainGPT) -> None:
    head(model)
    model.embedding.weight = model.head.weight


def two_factors(model: PlainGPT) -> None:
    """Two matrices of one branch, all that is trained in its block: either keeps the gradient from the other."""
    model.blocks[1].requires_grad_(False)
    for part in (model.blocks[1].feed_forward.up, model.blocks[1].feed_forward.down):
        nn.init.zeros_(part.weight.requires_grad_(True))


def cut_off(model: PlainGPT) -> None:
    head(model)
    model.blocks[1].__class__ = CutOff


def result_of(change: Change, check: str, seed: int = 0) -> Result:
    def made() -> nn.Module:
        model = plain()
        change(model)
        return model

    return Runner(Subject(made).open(seed=seed), shrink=False).run(get_check(check))


SOUND: dict[str, Change] = {
    "head": head,
    "head_and_projections": projections,
    "gate_per_channel": gates(Gated, lambda: nn.Parameter(torch.zeros(48))),
    "gate_per_block": gates(Gated, lambda: nn.Parameter(torch.zeros(()))),
    "gate_projected": gates(Modulated, modulation),
}
SHUT: dict[str, Change] = {
    "head_frozen": frozen,
    "head_given_nothing": given_nothing,
    "gain_of_the_last_norm": last_norm,
    "head_tied_to_the_embedding": tied,
    "two_factors": two_factors,
    "one_block_beside_a_sound_head": cut_off,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("change", SOUND.values(), ids=SOUND)
def test_what_opens_after_a_step_is_sound(change: Change, seed: int) -> None:
    result = result_of(change, "gradients.magnitude", seed)
    assert result.status == "passed", result.message
    assert "3 of 3 blocks get a gradient of exactly 0, behind parameters that start at 0" in result.message
    assert "of head.weight" in result.message


@pytest.mark.parametrize("change", SHUT.values(), ids=SHUT)
def test_what_stays_shut_has_vanished(change: Change) -> None:
    result = result_of(change, "gradients.magnitude")
    assert result.status == "failed"
    assert result.message.startswith("the gradient vanishes in a block")


def test_weights_other_than_those_at_zero_are_not_moved() -> None:
    result = result_of(lambda model: None, "gradients.magnitude")
    assert result.status == "passed"
    assert "exactly 0" not in result.message


@pytest.mark.parametrize("check", ["init.loss", "init.scale", "init.seeded", "gradients.magnitude", "gradients.reach"])
@pytest.mark.parametrize("seed", range(3))
def test_a_model_of_the_speed_runs_conforms(check: str, seed: int) -> None:
    result = Runner(Subject(lambda: build("speedrun"), name="speedrun").open(seed=seed), shrink=False).run(
        get_check(check)
    )
    assert result.status == "passed", result.message


@pytest.mark.parametrize("check", ["init.loss", "init.scale", "init.seeded"])
@pytest.mark.parametrize("change", SOUND.values(), ids=SOUND)
def test_zeros_are_a_sound_initialisation(change: Change, check: str) -> None:
    result = result_of(change, check)
    assert result.status == "passed", result.message
