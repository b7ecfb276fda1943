"""positions.reach: an influence that fades below the type's smallest number is no cut, and a cut is seen in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.planting import around
from fixtures.subjects.fading import AllAtOnce, DataDecides, DecayingState, Fading, SteepBias
from lmconform import Subject, check_model
from lmconform.registry import get_check
from lmconform.results import Result
from lmconform.runner import Runner

MIXERS = (DecayingState, DataDecides, AllAtOnce, SteepBias)
STEEP = (0.1, 0.3)  # 0.3 ** 85 is float32's smallest number
STEEPER = (0.02, 0.05)
MILD = (0.5, 0.9)


def reach(build: Callable[[], nn.Module], **how: Any) -> Result:
    return Runner(Subject(build, name="fading").open(**how), shrink=False).run(get_check("positions.reach"))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixer_that_fades_conforms(mixer: type[nn.Module]) -> None:
    report = check_model(Subject(functools.partial(Fading, mixer, *STEEP)), deselect=["training", "collapse"])
    red = [result for result in report.results if result.status not in ("passed", "not_applicable")]
    assert [f"{result.id}: {result.message}" for result in red] == []


@pytest.mark.parametrize(("decays", "seen"), [(MILD, False), (STEEP, True), (STEEPER, True)])
@pytest.mark.parametrize("mixer", MIXERS)
def test_fading_is_told_and_passes(mixer: type[nn.Module], decays: tuple[float, float], seen: bool) -> None:
    result = reach(functools.partial(Fading, mixer, *decays))
    assert result.status == "passed", result.message
    if mixer is not DataDecides or not seen:  # there small weights may leave decays so mild that all is felt
        assert ("an influence fades from token to token, until float32" in result.message) == seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_fading_passes_in_other_types(dtype: torch.dtype) -> None:
    result = reach(functools.partial(Fading, DecayingState, *STEEPER), dtype=dtype)
    assert result.status == "passed", result.message


# -- cuts --------------------------------------------------------------------------------------------------------------


def state_cleared(model: Any) -> None:
    """Every 24 tokens."""

    def carried(original: Any, state: Tensor, log_decay: Tensor, time: int) -> Tensor:
        return original(state, log_decay, time) * (time % 24 > 0)

    around(model.layers[1].mixer, carried, "carried")


def state_detached(model: Any) -> None:
    """Truncated backpropagation through time, every 16 tokens."""

    def carried(original: Any, state: Tensor, log_decay: Tensor, time: int) -> Tensor:
        return original(state if time % 16 else state.detach(), log_decay, time)

    around(model.layers[0].mixer, carried, "carried")


def first_token_lost(model: Any) -> None:
    def over_time(original: Any, added: Tensor, log_decays: Tensor) -> Tensor:
        return original(torch.cat([torch.zeros_like(added[:, :1]), added[:, 1:]], dim=1), log_decays)

    around(model.layers[1].mixer, over_time, "over_time")


def powers_end(model: Any, back: int) -> None:
    def powers(original: Any, log_decays: Tensor) -> Tensor:
        left = original(log_decays)
        return left * left.new_ones(left.shape[1:3]).tril().triu(1 - back)[..., None]

    around(model.layers[0].mixer, powers, "powers")


def bias_ends(model: Any, back: int, penalty: float) -> None:
    """Keys that lie `back` tokens back or more lose `penalty` in their score."""

    def bias(original: Any, distance: Tensor) -> Tensor:
        return original(distance) - penalty * (distance >= back)

    around(model.layers[0].mixer, bias, "bias")


@pytest.mark.parametrize(
    ("mixer", "decays", "plant", "says"),
    [
        pytest.param(DecayingState, MILD, state_cleared, "position 24 feels 1 of the 25", id="state_cleared"),
        pytest.param(DecayingState, STEEP, state_cleared, "position 24 feels 1 of the 25", id="steep_state_cleared"),
        pytest.param(DataDecides, STEEP, state_cleared, "position 24 feels 1 of the 25", id="data_decides_cleared"),
        pytest.param(DecayingState, STEEP, state_detached, "position 16 feels 1 of the 17", id="state_detached"),
        pytest.param(DecayingState, STEEPER, first_token_lost, "not token 0", id="first_token_lost"),
        pytest.param(AllAtOnce, MILD, functools.partial(powers_end, back=100), "feels 100 of", id="powers_end"),
        pytest.param(AllAtOnce, STEEP, functools.partial(powers_end, back=70), "feels 70 of", id="steep_powers_end"),
        pytest.param(AllAtOnce, STEEP, functools.partial(powers_end, back=82), "feels 82 of", id="powers_end_near"),
        pytest.param(SteepBias, MILD, functools.partial(bias_ends, back=8, penalty=300), "feels 8 of", id="penalty"),
        pytest.param(SteepBias, STEEP, functools.partial(bias_ends, back=8, penalty=300), "feels 8 of", id="steep"),
        pytest.param(SteepBias, STEEP, functools.partial(bias_ends, back=8, penalty=1e9), "feels 8 of", id="mask"),
    ],
)
def test_a_cut_is_seen(
    mixer: type[nn.Module], decays: tuple[float, float], plant: Callable[[Any], None], says: str
) -> None:
    def build() -> nn.Module:
        model = Fading(mixer, *decays)
        plant(model)
        return model

    result = reach(build)
    assert result.status == "failed", result.message
    assert says in result.message
