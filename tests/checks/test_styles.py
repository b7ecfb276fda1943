"""Models in the styles that people really write conform, and the off-by-one in each one's mask is caught."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures.subjects.styles import STYLES, Encoder, FloatMask, HandLlama, NestedLists, UnstatedTable
from fixtures.subjects.styles.lone_loss import LoneLoss
from fixtures.subjects.styles.nested_lists import Attend
from lmconform import Report, Subject, check_model
from lmconform.measuring import traces
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


@pytest.mark.parametrize("style", ["nanogpt", "mingpt", "lecture", "dataclass_out", "hand_llama", "lone_loss"])
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


def of_every_position(self: LoneLoss, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum") / targets.numel()


def shifted_once_more(self: LoneLoss, logits: Tensor, targets: Tensor) -> Tensor:
    return LoneLoss.loss(self, logits[:, :-1], targets[:, 1:])


def with_padding(self: LoneLoss, logits: Tensor, targets: Tensor) -> Tensor:
    return LoneLoss.loss(self, logits, targets.clamp(min=0))


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (of_every_position, "the sum divided by all positions, ignored ones too"),
        (shifted_once_more, "shift"),
        (with_padding, "differs from the float64 cross-entropy"),
    ],
)
def test_a_loss_that_comes_alone_is_compared(loss: Any, says: str) -> None:
    result = verdict(Subject(type("Wrong", (LoneLoss,), {"loss": loss})), "loss.reference")
    assert result.status == "failed"
    assert says in result.message


def test_the_gradient_of_a_loss_that_comes_alone_is_compared() -> None:
    class Detached(LoneLoss):
        def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
            return super().loss(torch.cat([logits[:, :1].detach(), logits[:, 1:]], dim=1), targets)

    assert verdict(Subject(Detached), "loss.reference").status == "passed"
    assert verdict(Subject(Detached), "loss.gradient").status == "failed"


def test_a_builder_may_set_the_seed_and_a_model_may_not() -> None:
    class SeedsItself(LoneLoss):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__()

    def seeded() -> nn.Module:
        model = LoneLoss()
        torch.manual_seed(0)
        return model.apply(drawn_anew)

    def seeded_for_each_block() -> nn.Module:
        model = LoneLoss()
        for block in model.blocks:
            torch.manual_seed(0)
            block.apply(drawn_anew)
        return model

    sound = verdict(Subject(seeded), "init.seeded")
    assert sound.status == "passed"
    assert "the builder sets the seed itself (test_styles.py:" in sound.message
    for broken in (SeedsItself, seeded_for_each_block):
        result = verdict(Subject(broken), "init.seeded")
        assert result.status == "failed"
        assert "same random" in result.message


def drawn_anew(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)


def test_flattened_logits_with_targets_are_read() -> None:
    model = subject_of("lecture").open()
    ids = model.probe_ids(3, 7)
    torch.testing.assert_close(model.forward(ids, labels=ids).logits, model.logits(ids))


@pytest.mark.parametrize("rows", [20, 129, 256, 1024])
def test_a_context_that_nobody_states_is_found(rows: int) -> None:
    found = Subject(lambda: UnstatedTable(rows=rows)).open()
    assert found.context_length == (None if rows == 1024 else rows)


def test_a_table_that_nobody_states_is_looked_at_to_its_end() -> None:
    result = verdict(Subject(lambda: UnstatedTable(rows=1100)), "positions.distinct")
    assert result.status == "passed"
    assert "1100 tokens are looked at" in result.message


def test_heads_are_no_blocks() -> None:
    from lmconform import structure

    name, blocks = structure.blocks(STYLES["lecture"](0)) or ("", [])
    assert name == "blocks"
    assert len(blocks) == 2


# -- lists in a list ---------------------------------------------------------------------------------------------------


def statuses(style: str) -> dict[str, str]:
    return {result.id: result.status for result in reported(style, 0).results}


def test_a_mask_that_wants_bool_is_given_bool() -> None:
    convention = subject_of("nested_lists").open().convention
    assert (convention.mask, convention.mask_is_bool) == ("mask", True)
    found = statuses("nested_lists")
    assert {found[check] for check in ("padding.left", "padding.right", "padding.finite")} == {"passed"}


class Planted(Attend):
    """One class for all, as the layers of a model have; those that are `wrong` call `attend` instead."""

    wrong = False

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None, past: Any) -> tuple:
        return (self.attend if self.wrong else super().forward)(x, angles, mask, past)


class SeesEight(Planted):
    """The last eight tokens alone."""

    def attend(self, x: Tensor, angles: Tensor, mask: Tensor | None, past: Any) -> tuple:
        ends = range(1, x.shape[1] + 1)
        cuts = [slice(max(0, end - 8), end) for end in ends]
        return torch.cat([Attend.forward(self, x[:, c], angles[:, :, c], None, None)[0][:, -1:] for c in cuts], 1), past


class SeesItself(Planted):
    def attend(self, x: Tensor, angles: Tensor, mask: Tensor | None, past: Any) -> tuple:
        return self.to_out(self.to_v(x)), past


class Unturned(Planted):
    """Rotary angles arrive and are not applied."""

    def attend(self, x: Tensor, angles: Tensor, mask: Tensor | None, past: Any) -> tuple:
        return Attend.forward(self, x, torch.zeros_like(angles), mask, past)


@pytest.mark.parametrize(
    ("kind", "which", "check", "says"),
    [
        (SeesEight, {1}, "positions.reach", "block 2, position 8 and token 0"),
        (SeesItself, {1}, "positions.reach", "block 2, position 1 and token 0"),
        (SeesItself, {0, 1}, "positions.reach", "block 0, position 1 and token 0"),
        (Unturned, {0, 1}, "positions.order_matters", "the first block alone does not see the order"),
        (Unturned, {0, 1}, "positions.distinct", "treated alike"),
    ],
)
def test_blocks_that_are_lists_are_looked_into(kind: type[Planted], which: set[int], check: str, says: str) -> None:
    def build() -> nn.Module:
        model = NestedLists()
        attends = [part for part in model.modules() if isinstance(part, Attend)]
        for index, attend in enumerate(attends):
            attend.__class__ = kind
            attend.wrong = index in which
        return model

    result = verdict(Subject(build, name="nested"), check)
    assert result.status == "failed", result.message
    assert says in f"{result.message} {result.where}"


def test_feed_forward_halves_are_not_asked_to_mix() -> None:
    result = verdict(subject_of("nested_lists"), "positions.reach")
    assert result.status == "passed"
    assert "blocks 1, 3 mix no tokens" in result.message


def test_stream_is_read_at_lists() -> None:
    subject = subject_of("nested_lists").open()
    stream = traces.stream(subject, subject.probe_ids(2, 7))
    assert stream is not None
    assert stream.names == ["the input of attn_layers.layers.0", *(f"attn_layers.layers.{index}" for index in range(4))]
    normed = subject.module.attn_layers.final_norm(stream.states[-1])
    torch.testing.assert_close(subject.module.to_logits(normed), stream.logits)


# -- what belongs to one library ---------------------------------------------------------------------------------------


def test_positions_that_need_a_cache_are_not_given() -> None:
    subject = subject_of("layer_caches").open()
    assert subject.convention.positions is None
    assert "input_pos= takes no positions 0, 1, ... [1, time]: TypeError" in subject.can("pos").reason
    assert statuses("layer_caches")["config.knobs"] == "passed"  # a factor of experts, where there are none


def test_key_biases_by_head_are_invariant() -> None:
    result = verdict(subject_of("head_weights"), "gradients.reach")
    assert result.status == "passed"
    assert "invariant: blocks.0.attn.b_K" in result.message


class TwoNames(FloatMask):
    """Its layers can be reached by another path, as in a wrapper that keeps what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = self.layers


class OneLayerTwice(FloatMask):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.layers[0]] * 2)


class ReadWeights(nn.Module):
    """Computes a norm from the weights of the module it wraps, as a bridge between two libraries does."""

    def __init__(self, wrapped: nn.LayerNorm) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.wrapped.normalized_shape, self.wrapped.weight, self.wrapped.bias)


class TwoNamesForReadWeights(FloatMask):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.ln1 = ReadWeights(layer.ln1)
        self.norms = nn.ModuleList(layer.ln1 for layer in self.layers)


class OneNormTwice(TwoNamesForReadWeights):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].ln1 = self.layers[0].ln1


class OneNormReadTwice(TwoNamesForReadWeights):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].ln1.wrapped = self.layers[0].ln1.wrapped


class ReadWeightsTwice(nn.Module):
    """Two names for one norm, both read."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.first = self.second = norm

    def forward(self, x: Tensor) -> Tensor:
        for norm in (self.first, self.second):
            x = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)
        return x


class OneNormUnderTwoNames(FloatMask):
    def __init__(self) -> None:
        super().__init__()
        self.layers[0].ln1 = ReadWeightsTwice(self.layers[0].ln1)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (OneNormUnderTwoNames, "failed"),
        (TwoNames, "passed"),
        (OneLayerTwice, "failed"),
        (TwoNamesForReadWeights, "passed"),
        (OneNormTwice, "failed"),
        (OneNormReadTwice, "failed"),
    ],
)
def test_two_names_for_one_layer_are_no_repeated_layer(kind: type[nn.Module], status: str) -> None:
    assert verdict(Subject(kind), "gradients.registered").status == status


def test_an_own_generate_is_told_not_to_wait_for_eos(capsys: pytest.CaptureFixture[str]) -> None:
    result = verdict(subject_of("head_weights"), "generation.greedy")
    assert result.status == "passed", result.message
    assert "token 0" not in capsys.readouterr().out  # verbose=False


def test_cache_of_tuples_is_used() -> None:
    statuses = {result.id: result.status for result in reported("hand_llama", 0).results}
    assert statuses["cache.decode"] == "passed"
    assert isinstance(HandLlama()(torch.ones(1, 3, dtype=torch.long), use_cache=True)[-1], list)
