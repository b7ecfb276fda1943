"""A plain port of GPT-2 beside transformers' own: sound it is green, each transfer fault is named with its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fixtures.subjects import build
from fixtures.subjects.plain_gpt2 import PerHeadOutput, PlainGPT2
from lmconform import Subject
from lmconform.excitation import excite
from lmconform.registry import get_check
from lmconform.results import Result
from lmconform.runner import Runner

CHECKS = ("parity.logits", "parity.hidden", "parity.gradients", "parity.scale", "parity.transfer")
Plant = Callable[[PlainGPT2, Any], object]


def pretrained(excited: bool) -> Any:
    """transformers' GPT-2: fresh, or with weights moved away from their start as training would."""
    model = build("gpt2")
    if excited:
        excite(model, seed=0)
    return model.eval()


def ported(model: Any, plant: Plant | None = None) -> PlainGPT2:
    made = PlainGPT2.from_transformers(model)
    if plant is not None:
        plant(made, model)
    return made


def verdict(check: str, plant: Plant | None = None, excited: bool = True) -> Result:
    model = pretrained(excited)
    specimen = Subject(lambda: ported(model, plant), name="port").open()
    specimen.reference = Subject(lambda: copy.deepcopy(model), name="gpt2").open(as_loaded=True)
    return Runner(specimen, shrink=False).run(get_check(check))


def outputs_by_head(port: PlainGPT2, model: Any, *, rows: bool) -> None:
    for ours, theirs in zip(port.layers, model.transformer.h):
        width, heads = theirs.attn.c_proj.weight.shape[0], model.config.n_head
        made = PerHeadOutput(width, heads)
        made.cut(theirs.attn.c_proj.weight, theirs.attn.c_proj.bias, rows=rows)
        ours.attention.out = made


def untransposed(port: PlainGPT2, model: Any) -> None:
    weight = port.layers[1].attention.out.weight
    weight.data = weight.data.T.contiguous()


def exact_gelu(port: PlainGPT2, model: Any) -> None:
    port.layers[1].feed_forward.approximate = "none"


def other_epsilon(port: PlainGPT2, model: Any) -> None:
    port.layers[1].before_attention.eps = 1e-4


def shifted_positions(port: PlainGPT2, model: Any) -> None:
    port.first_position = 1


def not_copied(port: PlainGPT2, model: Any) -> None:
    weight = port.layers[0].feed_forward.rise.weight
    weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.1


def bias_forgotten(port: PlainGPT2, model: Any) -> None:
    port.layers[1].attention.key.bias.data.zero_()
    port.layers[1].attention.value.bias.data.zero_()


@pytest.mark.parametrize("excited", [True, False], ids=["excited", "fresh"])
@pytest.mark.parametrize("check", CHECKS)
def test_sound_port_is_green(check: str, excited: bool) -> None:
    result = verdict(check, excited=excited)
    assert result.status == "passed", result.message
    assert result.margin is not None
    assert result.margin < 0.5


@pytest.mark.parametrize("check", CHECKS)
def test_output_projection_by_head_cut_by_rows_is_green(check: str) -> None:
    result = verdict(check, partial(outputs_by_head, rows=True))
    assert result.status == "passed", result.message


@pytest.mark.parametrize(
    ("plant", "check", "says"),
    [
        (partial(outputs_by_head, rows=False), "parity.transfer", "rows for columns"),
        (partial(outputs_by_head, rows=False), "parity.hidden", "layers.0.attention.out.parts.0"),
        (untransposed, "parity.transfer", "layers.1.attention.out.weight transposed, the logits equal"),
        (untransposed, "parity.hidden", "layers.1.attention.out takes an input that the reference has too"),
        (exact_gelu, "parity.hidden", "what goes into layers.1.feed_forward.fall is found nowhere"),
        (exact_gelu, "parity.logits", "logits differ from the reference's"),
        (other_epsilon, "parity.hidden", "layers.1.before_attention"),
        (shifted_positions, "parity.hidden", "before the first block"),
        (shifted_positions, "parity.transfer", "wpe.weight of the reference was found in places.weight"),
        (not_copied, "parity.transfer", "layers.0.feed_forward.rise.weight holds numbers from elsewhere"),
        (bias_forgotten, "parity.transfer", "h.1.attn.c_attn.bias of the reference is not what"),
    ],
)
def test_fault_is_found_and_its_place_named(plant: Plant, check: str, says: str) -> None:
    result = verdict(check, plant)
    assert result.status == "failed", result.message
    assert says in result.message


def test_wrong_code_leaves_transfer_green() -> None:
    assert verdict("parity.transfer", exact_gelu).status == "passed"


def test_gradients_wait_for_equal_logits() -> None:
    assert verdict("parity.gradients", untransposed).status == "blocked"


def test_padded_vocabulary_is_compared_as_far_as_it_goes() -> None:
    def pad(port: PlainGPT2, model: Any) -> None:
        weight = port.tokens.weight
        port.tokens = torch.nn.Embedding(weight.shape[0] + 5, weight.shape[1])
        port.tokens.weight.data[: weight.shape[0]] = weight.data

    for check in ("parity.logits", "parity.transfer"):
        result = verdict(check, pad)
        assert result.status == "passed", result.message
        assert "vocabularies" in result.message


def test_other_number_of_blocks_is_said() -> None:
    def drop(port: PlainGPT2, model: Any) -> None:
        del port.layers[1]

    result = verdict("parity.hidden", drop)
    assert "the model has 1 blocks, the reference 2" in result.message
