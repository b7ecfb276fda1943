"""What the precision checks stand on: rounding noise is measured, experts are replayed, float32 is kept where asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fixtures.subjects import build
from lmconform import Subject
from lmconform.checks.precision import check_type
from lmconform.context import Context
from lmconform.measuring.rounding import Choices, in_type, kept_in_float32, rounded, traced
from lmconform.registry import get_check
from lmconform.runner import Runner
from lmconform.specimen import Specimen

HALVES = (torch.bfloat16, torch.float16)


def opened(name: str, layers: int | None = None) -> Specimen:
    def made() -> Any:
        model = build(name)
        if layers is not None:
            del model.blocks[layers:]
        return model

    return Subject(made).open()


def noise(subject: Specimen, dtype: torch.dtype) -> float:
    """How far rounding every submodule's output moves most tokens."""
    exact = in_type(in_type(subject, dtype), torch.float64)
    ids = subject.probe_ids(4, 32)
    moved = rounded(exact, dtype, frozenset(), 0, lambda model: model.logits(ids)) - exact.logits(ids)
    return float(moved.abs().amax(-1).quantile(0.5))


def test_noise_follows_the_type() -> None:
    subject = opened("plain")
    expected = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float16).eps
    assert noise(subject, torch.bfloat16) / noise(subject, torch.float16) == pytest.approx(expected, rel=0.5)


def test_noise_grows_with_depth() -> None:
    assert noise(opened("plain", 3), torch.bfloat16) > 1.2 * noise(opened("plain", 1), torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["plain", "mixtral", "mamba"])
def test_drift_of_a_sound_model_is_of_the_size_of_the_noise(name: str, dtype: torch.dtype) -> None:
    """The bound is no guess that everything passes: the drift fills a good part of it."""
    subject = opened(name)
    context = Context(get_check("precision.bfloat16"), subject)
    check_type(subject, context, dtype)
    assert context.tightest is not None
    measured, allowed, _ = context.tightest
    assert 0.1 < measured / allowed <= 1


def test_figures_are_the_same_on_every_pretended_device(device: str) -> None:
    figures = []
    for where in ("cpu", device):
        result = Runner(Subject(lambda: build("plain")).open(device=where)).run(get_check("precision.bfloat16"))
        assert result.status == "passed"
        figures.append((result.measured, result.allowed))
    if device in ("cpu", "sim"):
        assert figures[0] == figures[1]


def test_experts_are_replayed() -> None:
    scores = torch.tensor([[0.5, 0.50001, 0.1], [0.2, 0.1, 0.9]])
    nudged = scores + torch.tensor([0.001, 0.0, 0.0])
    choices = Choices()
    with choices.mode(replay=False):
        chosen = scores.topk(1).indices
    with choices.mode(replay=True):
        values, indices = nudged.topk(1)
    assert torch.equal(indices, chosen)
    assert torch.equal(values, nudged.gather(1, chosen))
    assert not torch.equal(nudged.topk(1).indices, chosen)


def test_choices_of_another_shape_are_left_alone() -> None:
    choices = Choices()
    with choices.mode(replay=False):
        torch.tensor([[0.5, 0.4]]).topk(1)
    with choices.mode(replay=True):
        assert torch.tensor([[0.1, 0.2], [0.4, 0.3]]).topk(1).indices.tolist() == [[1], [0]]


def test_what_the_class_keeps_in_float32_is_kept() -> None:
    subject = opened("plain")
    type(subject.module)._keep_in_fp32_modules_strict = {"norm"}  # type: ignore[attr-defined]
    try:
        half = in_type(subject, torch.bfloat16).module
        pattern = kept_in_float32(half, torch.bfloat16)
    finally:
        del type(subject.module)._keep_in_fp32_modules_strict  # type: ignore[attr-defined]
    assert pattern is not None
    kinds = {name: parameter.dtype for name, parameter in half.named_parameters()}
    assert {kind for name, kind in kinds.items() if pattern.search(name)} == {torch.float32}
    assert {kind for name, kind in kinds.items() if not pattern.search(name)} == {torch.bfloat16}


def test_the_first_module_that_leaves_the_type_is_found() -> None:
    half = in_type(opened("plain"), torch.bfloat16)
    half.module.blocks[1].feed_forward.register_forward_hook(lambda part, args, output: output.float())
    with pytest.raises(RuntimeError), traced(half.module) as trace:
        half.logits(half.probe_ids())
    step = trace.first_outside(torch.bfloat16)
    assert step is not None
    assert step.name == "blocks.1.feed_forward"
    assert trace.place.startswith("blocks.2")
