"""Models in the styles that people really write conform, and the off-by-one in each one's mask is caught."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fixtures.subjects.styles import STYLES, Encoder, HandLlama, MaskArgument
from lmconform import Report, Subject, check_model
from lmconform.registry import get_check
from lmconform.results import Result
from lmconform.runner import Runner

TRAINED = ("nanogpt", "mingpt")  # labels to be left out are -1: -100 is out of bounds
RED = ("failed", "warned", "error")
SEEDS = range(1, 4)


def subject_of(style: str, ahead: int = 0) -> Subject:
    return Subject(functools.partial(STYLES[style], ahead), name=style)


@functools.cache
def reported(style: str, seed: int) -> Report:
    return check_model(subject_of(style), seed=seed, deselect=["training", "collapse"])


def verdict(subject: Subject, check: str) -> Result:
    return Runner(subject.open(), shrink=False).run(get_check(check))


def conforms(report: Report) -> None:
    assert [f"{result.id}: {result.message}" for result in report.results if result.status in RED] == []
    assert report.counts["blocked"] == 0


@pytest.mark.parametrize("style", STYLES)
def test_conforms(style: str) -> None:
    conforms(reported(style, 0))
    assert reported(style, 0).counts["passed"] >= 24


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("style", STYLES)
def test_conforms_under_other_seeds(style: str, seed: int) -> None:
    conforms(reported(style, seed))


@pytest.mark.parametrize("style", TRAINED)
def test_learns(style: str) -> None:
    report = check_model(subject_of(style), select=["training", "collapse"])
    conforms(report)
    passed = {result.id for result in report.results if result.status == "passed"}
    assert passed >= {"training.memorize", "training.uses_context", "training.honest"}


@pytest.mark.parametrize("style", STYLES)
def test_mask_off_by_one_is_caught(style: str) -> None:
    result = verdict(subject_of(style, ahead=1), "causality.no_future_leak")
    assert result.status == "failed"
    assert "logits up to t change when only tokens after t change" in result.message


@pytest.mark.parametrize("style", [name for name in STYLES if name != "lstm"])
def test_every_token_is_reached_and_told_apart(style: str) -> None:
    """Sequence-first blocks, hard attention after sqrt(width) and blocks in an nn.Sequential are no reason to pass."""
    statuses = {result.id: result.status for result in reported(style, 0).results}
    assert statuses["positions.order_matters"] == "passed"
    assert statuses["positions.reach"] == "passed"
    assert statuses["positions.distinct"] == "passed"


@pytest.mark.parametrize("style", ["nanogpt", "mingpt", "lecture", "dataclass_out", "hand_llama"])
def test_loss_is_compared(style: str) -> None:
    statuses = {result.id: result.status for result in reported(style, 0).results}
    assert statuses["loss.reference"] == "passed"
    assert statuses["loss.gradient"] == "passed"


def sees_eight(model: nn.Module) -> None:
    """The second block sees the last eight tokens alone."""

    def hides(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        far = torch.ones_like(kwargs["src_mask"], dtype=torch.bool).tril(-8)
        return args, {**kwargs, "src_mask": kwargs["src_mask"].masked_fill(far, float("-inf")), "is_causal": False}

    model.encoder.layers[1].register_forward_pre_hook(hides, with_kwargs=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_window_is_caught_in_every_layout(batch_first: bool, norm_first: bool) -> None:
    def build() -> nn.Module:
        model = Encoder(batch_first=batch_first, norm_first=norm_first)
        sees_eight(model)
        return model

    result = verdict(Subject(build, name="windowed"), "positions.reach")
    assert result.status == "failed"
    assert "block 1" in result.message
    assert "feels 8 of the" in result.message


def test_encoder_layers_copied_by_torch_are_named() -> None:
    result = verdict(Subject(lambda: Encoder(drawn_anew=False), name="copied"), "init.seeded")
    assert result.status == "failed"
    assert "nn.TransformerEncoder copies one layer" in result.message


def test_mask_argument_is_told_from_a_padding_mask() -> None:
    found = subject_of("mask_argument").open()
    assert found.convention.mask is None
    assert "mask= is no padding mask [batch, time]" in found.can("mask").reason
    assert subject_of("hand_llama").open().can("mask")


def test_ignored_label_is_found() -> None:
    found = {style: subject_of(style).open().can("ignored_label").value for style in (*TRAINED, "lecture")}
    assert found == {"nanogpt": -1, "mingpt": -1, "lecture": -100}


def test_loss_alone_is_no_fault() -> None:
    """With labels the loss alone comes back: there are no logits to compare it with."""

    class LossAlone(MaskArgument):
        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            logits = super().forward(x)
            return logits if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    result = verdict(Subject(LossAlone), "loss.reference")
    assert result.status == "not_applicable"
    assert "returns the loss alone" in result.message


def test_flattened_logits_with_targets_are_read() -> None:
    model = subject_of("lecture").open()
    ids = model.probe_ids(3, 7)
    torch.testing.assert_close(model.forward(ids, labels=ids).logits, model.logits(ids))


def test_a_table_that_nobody_states_is_looked_at_to_its_end() -> None:
    result = verdict(subject_of("unstated_table"), "positions.distinct")
    assert result.status == "passed"
    assert "256 tokens are looked at" in result.message


def test_heads_are_no_blocks() -> None:
    from lmconform import structure

    name, blocks = structure.blocks(STYLES["lecture"](0)) or ("", [])
    assert name == "blocks"
    assert len(blocks) == 2


def test_cache_of_tuples_is_used() -> None:
    statuses = {result.id: result.status for result in reported("hand_llama", 0).results}
    assert statuses["cache.decode"] == "passed"
    assert isinstance(HandLlama()(torch.ones(1, 3, dtype=torch.long), use_cache=True)[-1], list)
