"""generation.beams searches where beams cross, and says which part of a wrong score is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fixtures.faults.held_out_reported.attention import window_inclusive
from fixtures.faults.held_out_reported.caches import states_not_reordered
from fixtures.planting import around
from fixtures.subjects import build
from lmconform import check_model
from lmconform.measuring.generating import Beams, Generator
from lmconform.results import Result

Planting = Callable[[nn.Module], Any]
NOTHING_OF_REORDERING = "no beam was seen to take over another's cache"


def beams_of(host: str, plant: Planting = lambda model: None, seed: int = 0) -> Result:
    """The check's result on a sound host that `plant` has changed."""

    def made() -> nn.Module:
        model = build(host, seed)
        plant(model)
        return model

    return next(
        r for r in check_model(made, select=["generation.beams"], seed=seed).results if r.id == "generation.beams"
    )


def goes_on_after_its_end(model: nn.Module) -> None:
    def generate(original: Any, *args: Any, eos_token_id: Any = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    around(model, generate, "generate")


def adds_up_logits(model: nn.Module) -> None:
    """The score is the sum of raw logits: the search's own log_softmax is undone, step by step."""

    def generate(original: Any, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        made = original(inputs, *args, **kwargs)
        if hasattr(made, "sequences_scores"):
            made.scores = tuple(step + 3.0 for step in made.scores)
            new = made.sequences.shape[1] - inputs.shape[1]
            made.sequences_scores = made.sequences_scores + 3.0 * new / new ** kwargs["length_penalty"]
        return made

    around(model, generate, "generate")


def length_forgotten(model: nn.Module) -> None:
    def generate(original: Any, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "length_penalty": 0.0})

    around(model, generate, "generate")


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Beams]:
    """Every beam search that a check makes."""
    made: list[Beams] = []
    original = Generator.beams

    def beams(self: Generator, *args: Any, **kwargs: Any) -> Beams:
        made.append(original(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(Generator, "beams", beams)
    return made


@pytest.mark.parametrize("host", ["gpt2", "llama", "gemma2", "mamba"])
def test_beams_cross_on_sound_models(host: str, searches: list[Beams]) -> None:
    result = beams_of(host)
    assert result.status == "passed", result.message
    assert NOTHING_OF_REORDERING not in result.message
    crossed = [search.crossed() for search in searches]
    assert any(where is not None and bool(where.any()) for where in crossed)


@pytest.mark.parametrize("seed", range(3))
def test_a_cache_that_is_not_reordered_is_seen_on_sharp_logits(seed: int) -> None:
    result = beams_of("mamba", states_not_reordered, seed)
    assert result.status == "failed"
    assert result.suspects == ("cache.not_reordered",)
    assert "not reordered with the beams" in result.message


@pytest.mark.parametrize("seed", range(2))
def test_a_window_one_off_in_the_cache_is_no_end_that_is_ignored(seed: int) -> None:
    result = beams_of("local_global", window_inclusive, seed)
    assert result.status == "failed"
    assert "differs from its rescored log-probability" in result.message
    assert not {"generation.stop_ignored", "generation.beam_score_wrong", "cache.not_reordered"} & {*result.suspects}
    assert "what the cache holds or how it is read" in result.message


@pytest.mark.parametrize(
    ("plant", "suspects", "said"),
    [
        pytest.param(goes_on_after_its_end, ("generation.stop_ignored", "generation.beam_score_wrong"), "goes on after",
                     id="goes_on"),
        pytest.param(length_forgotten, ("generation.beam_score_wrong",), "another length", id="length"),
        pytest.param(adds_up_logits, ("generation.beam_score_wrong", "cache.not_reordered"), "log_softmax",
                     id="logits_summed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("host", ["gpt2", "llama"])
def test_the_wrong_part_of_a_score_is_named(host: str, plant: Planting, suspects: tuple[str, ...], said: str) -> None:
    result = beams_of(host, plant)
    assert result.status == "failed"
    assert result.suspects == suspects, result.message
    assert said in result.message


def test_a_generate_that_calls_another_module_is_scored_at_its_own_temperature(searches: list[Beams]) -> None:
    class Wrapped(nn.Module):
        """generate() goes to the inner model, and so do its forward() calls."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config

        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return self.inner(input_ids, **kwargs)

        def generate(self, inputs: torch.Tensor, generation_config: Any = None, **kwargs: Any) -> Any:
            return self.inner.generate(inputs, generation_config=generation_config, **kwargs)

    report = check_model(lambda: Wrapped(build("gpt2")), select=["generation.beams"])
    assert report.ok, report.failed
    assert {search.temperature for search in searches} == {1.0}
