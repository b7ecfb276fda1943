"""What parity says beyond "differs": remedies tried out name the cause, and what is equal is not blamed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fixtures.reports import CASES
from fixtures.subjects import build
from fixtures.subjects.plain_gpt2 import PerHeadOutput, PlainGPT2
from lmconform import Subject
from lmconform.excitation import excite
from lmconform.registry import get_check
from lmconform.results import Result
from lmconform.runner import Runner


class Gate(nn.Module):
    """Wraps a part; what it gives is multiplied by a learnable number for each channel, or by one for all."""

    def __init__(self, part: nn.Module, start: torch.Tensor) -> None:
        super().__init__()
        self.part, self.gate = part, nn.Parameter(start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate * self.part(x)


def reference() -> Any:
    model = build("gpt2")
    excite(model, seed=0)
    return model.eval()


def verdict(check: str, ours: nn.Module, theirs: nn.Module) -> Result:
    specimen = Subject(lambda: copy.deepcopy(ours), name="port").open(as_loaded=True)
    specimen.reference = Subject(lambda: copy.deepcopy(theirs), name="gpt2").open(as_loaded=True)
    return Runner(specimen, shrink=False).run(get_check(check))


def gated(port: PlainGPT2, start: torch.Tensor) -> None:
    for layer in port.layers:
        layer.attention = Gate(layer.attention, start.clone())


def by_head(port: PlainGPT2, theirs: Any) -> None:
    """Output projections by head, cut rightly: their outputs exist nowhere in the reference."""
    for ours, block in zip(port.layers, theirs.transformer.h):
        made = PerHeadOutput(block.attn.c_proj.weight.shape[0], theirs.config.n_head)
        made.cut(block.attn.c_proj.weight, block.attn.c_proj.bias, rows=True)
        ours.attention.out = made


@pytest.mark.parametrize(
    ("start", "cause", "says"),
    [
        (lambda width: torch.tensor(0.95), "scale.hidden", "set to 1 the logits equal the reference's; they are 0.95"),
        (
            lambda width: torch.linspace(0.9, 1.0, width),
            "scale.hidden",
            "they are 0.9 to 1, a scale that the reference does not have",
        ),
        (lambda width: torch.tensor(0.0), "attention.gated_off", "they are 0, a scale"),
    ],
    ids=["one_number", "one_a_channel", "shut"],
)
def test_scale_of_its_own_is_tried_out(start: Callable[[int], torch.Tensor], cause: str, says: str) -> None:
    theirs = reference()
    port = PlainGPT2.from_transformers(theirs)
    gated(port, start(theirs.config.n_embd))
    result = verdict("parity.hidden", port, theirs)
    assert result.status == "failed"
    assert says in result.message, result.message
    assert result.suspects[0] == cause


def test_gates_at_one_are_green() -> None:
    theirs = reference()
    port = PlainGPT2.from_transformers(theirs)
    gated(port, torch.tensor(1.0))
    assert verdict("parity.hidden", port, theirs).status == "passed"


def test_scale_is_not_blamed_for_a_weight() -> None:
    theirs = reference()
    port = PlainGPT2.from_transformers(theirs)
    gated(port, torch.tensor(0.95))
    port.layers[0].feed_forward.rise.weight.data *= -1
    assert "set to 1" not in verdict("parity.hidden", port, theirs).message


@pytest.mark.parametrize("layer", [0, 1])
def test_parts_that_the_reference_lacks_are_not_blamed(layer: int) -> None:
    theirs = reference()
    port = PlainGPT2.from_transformers(theirs)
    by_head(port, theirs)
    port.layers[layer].feed_forward.approximate = "none"
    result = verdict("parity.hidden", port, theirs)
    assert f"what goes into layers.{layer}.feed_forward.fall is found nowhere" in result.message, result.message
    assert result.suspects[0] == "activation.differs"


@pytest.mark.parametrize(
    ("kept", "says", "cause"),
    [
        ("ours", "what is added at position t is row t of places.weight", "position.base_kept"),
        ("theirs", "what is missing at position t is row t of transformer.wpe.weight", "position.absent"),
        ("shifted", "row t + 2 of places.weight is read for position t", "position.offset"),
    ],
)
def test_difference_by_position_names_the_table(kept: str, says: str, cause: str) -> None:
    theirs = reference()
    port = PlainGPT2.from_transformers(theirs)
    if kept == "ours":
        theirs.transformer.wpe.weight.data.zero_()
    elif kept == "theirs":
        port.places.weight.data.zero_()
    else:
        port.first_position = 2
    result = verdict("parity.hidden", port, theirs)
    assert says in result.message, result.message
    assert result.suspects[0] == cause


@pytest.mark.parametrize("code", ["as_kept_by_heads", "as_kept_by_kind"])
def test_fused_projection_viewed_the_other_way(code: str) -> None:
    case = CASES["positional_rope"]
    right, wrong = case.switches.none(), case.switches.only("qkv_order")
    ours, theirs = (wrong, right) if code == "as_kept_by_heads" else (right, wrong)
    torch.manual_seed(0)
    subject = case.subject(ours).open(as_loaded=True)
    subject.reference = case.subject(theirs).open(as_loaded=True)
    result = Runner(subject, shrink=False).run(get_check("parity.transfer"))
    views = "[4 heads, (q, k, v), 16]", "[(q, k, v), 4 heads, 16]"
    kept, read = views if code == "as_kept_by_heads" else views[::-1]
    assert f"the weights are laid out as {kept}, the code views them as {read}" in result.message, result.message
    assert result.suspects == ("attention.heads_scrambled",)


def test_turned_twice_is_tried_out() -> None:
    case = CASES["positional_rope"]
    subject = case.subject(case.switches.only("base_kept")).open(as_loaded=True)
    subject.reference = Subject(case.reference).open(as_loaded=True)
    result = Runner(subject, shrink=False).run(get_check("parity.hidden"))
    assert "queries and keys are turned twice" in result.message, result.message
    assert result.suspects == ("position.base_kept",)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_weight_of_one_number_in_both_is_transferred(value: float) -> None:
    theirs = reference()
    theirs.transformer.h[1].mlp.c_proj.weight.data.fill_(value)
    port = PlainGPT2.from_transformers(theirs)
    result = verdict("parity.transfer", port, theirs)
    assert result.status == "passed", result.message
    assert "is one number throughout" in result.message


def test_weight_of_one_number_in_one_of_them_is_not() -> None:
    theirs = reference()
    port = PlainGPT2.from_transformers(theirs)
    theirs.transformer.h[1].mlp.c_proj.weight.data.fill_(0.5)
    result = verdict("parity.transfer", port, theirs)
    assert result.status == "failed"
    assert "transformer.h.1.mlp.c_proj.weight" in result.message, result.message
