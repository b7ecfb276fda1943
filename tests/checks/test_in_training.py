"""What a sound model does in train mode alone is no fault: further tokens, buffers that learn, experts to be chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures.subjects import build
from fixtures.subjects.in_training import SHARE, FurtherToken, balanced, further_token
from fixtures.subjects.modern.latent import Gate
from fixtures.subjects.plain import FeedForward, PlainConfig, PlainGPT, plain
from lmconform import Result, Subject, check_model
from lmconform.diagnosis import diagnose
from lmconform.measuring.buffers import buffers_kept
from lmconform.registry import get_check
from lmconform.runner import Runner
from lmconform.sweep.batches import next_token
from lmconform.sweep.members import Member, train

Build = Callable[[], nn.Module]
COSTLY = ["training", "collapse", "distributed", "placement.compile"]


def result_of(made: Build, check: str, seed: int = 0) -> Result:
    return Runner(Subject(made).open(seed=seed), shrink=False).run(get_check(check))


def blamed(made: Build, check: str) -> str:
    runner = Runner(Subject(made).open(), shrink=False)
    return diagnose([runner.run(get_check(check))], runner)[0].id


@pytest.mark.parametrize("made", [further_token, balanced])
def test_it_conforms(made: Build) -> None:
    report = check_model(Subject(made), deselect=COSTLY)
    red = [result for result in report.results if result.status not in ("passed", "not_applicable")]
    assert [f"{result.id}: {result.message}" for result in red] == []


# -- a loss with a further term ----------------------------------------------------------------------------------------


class OfTheLogits(FurtherToken):
    """The logits are made smaller by the further term: the loss is no cross-entropy towards them."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **rest: Any) -> Any:
        output = super().forward(input_ids, labels=labels, **rest)
        if self.training and output.loss is not None:
            output.loss = output.loss + 1e-4 * output.logits.logsumexp(-1).square().mean()
        return output


class OfOtherLogits(FurtherToken):
    """What is given back is a copy: nothing tells the further term from a wrong cross-entropy."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **rest: Any) -> Any:
        output = super().forward(input_ids, labels=labels, **rest)
        output.logits = output.logits.clone()
        return output


class NotANumber(FurtherToken):
    def further_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return super().further_loss(hidden, labels) * torch.nan


class Stated(FurtherToken):
    """The further term under a name of its own, its coefficient on the model; in eval mode too."""

    mtp_loss_coef = SHARE

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **rest: Any) -> Any:
        training, self.training = self.training, False
        output = super().forward(input_ids, labels=labels, **{**rest, "output_hidden_states": True})
        self.training = training
        if labels is not None and labels.shape[1] > 2 and bool((labels[:, 2:] != -100).any()):
            output.mtp_loss = self.further_loss(output.hidden_states[-1], labels)
            output.loss = output.loss + SHARE * output.mtp_loss
        return output


class NeverTaught(FurtherToken):
    def further_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return super().further_loss(hidden, labels).detach()


@pytest.mark.parametrize("seed", range(3))
def test_a_term_beside_the_logits_is_noted(seed: int) -> None:
    result = result_of(further_token, "loss.reference", seed)
    assert result.status == "passed", result.message
    assert "in train mode the loss holds another term" in result.message


def test_a_stated_term_is_taken_off() -> None:
    result = result_of(Stated, "loss.reference")
    assert result.status == "passed", result.message
    assert "mtp_loss_coef * mtp_loss (coefficient 0.3), taken off" in result.message


@pytest.mark.parametrize(
    ("made", "suspects"),
    [(OfTheLogits, ("loss.normalisation", "loss.smoothing_wrong", "loss.ignore_index")), (OfOtherLogits, ())],
)
def test_a_term_that_cannot_be_told_apart_is_red(made: Build, suspects: tuple[str, ...]) -> None:
    result = result_of(made, "loss.reference")
    assert result.status == "failed"
    assert "in eval mode it is right, in train mode " in result.message
    assert result.suspects == suspects


def test_a_further_term_of_nan_is_red() -> None:
    assert result_of(NotANumber, "loss.reference").status == "failed"


def test_what_the_loss_alone_reaches_is_used() -> None:
    result = result_of(further_token, "gradients.reach")
    assert result.status == "passed", result.message
    assert "the model's own loss in train mode reaches beside the logits: further_norm.weight" in result.message


class LossThatRaises(FurtherToken):
    def further_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        raise ValueError("no loss can be had")


@pytest.mark.parametrize("made", [NeverTaught, LossThatRaises])
def test_what_no_loss_reaches_is_unused(made: Build) -> None:
    result = result_of(made, "gradients.reach")
    assert result.status == "failed"
    assert "forward() never uses it" in result.message
    assert result.where.startswith("further")


class ValueHead(PlainGPT):
    """Logits, the loss, and a value for each token; with `used` a second head that nothing gives back."""

    def __init__(self, used: bool = True) -> None:
        super().__init__(PlainConfig())
        self.value, self.other = nn.Linear(48, 1), None if used else nn.Linear(48, 1)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, None, Tensor]:
        states: list[Tensor] = []
        hook = self.norm.register_forward_hook(lambda module, args, output: states.append(output))
        logits = super().forward(input_ids).logits
        hook.remove()
        return logits, None, self.value(states[0]).squeeze(-1)


class Quantiles(ValueHead):
    """Five numbers a token in place of one."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(48, 5)


def test_several_values_a_token_are_no_hidden_states() -> None:
    assert result_of(Quantiles, "gradients.reach").status == "passed"


def test_a_value_head_is_used_by_what_it_gives() -> None:
    result = result_of(ValueHead, "gradients.reach")
    assert result.status == "passed", result.message
    assert "reaches another output of forward(), beside the logits: value.weight, value.bias" in result.message


def test_a_head_that_gives_nothing_is_unused() -> None:
    result = result_of(functools.partial(ValueHead, used=False), "gradients.reach")
    assert result.status == "failed"
    assert result.where == "other.weight; 1 more: other.bias"


# -- buffers that learn ------------------------------------------------------------------------------------------------


def kept_outside() -> nn.Module:
    """The bias is a plain tensor of the gate."""
    model = balanced()
    for layer in model.layers[1:]:
        del layer.ffn.gate.bias
        layer.ffn.gate.bias = torch.zeros(model.args.n_routed_experts)
    return model


class LongerTable(FeedForward):
    """A table in a buffer outside the state dict that is extended on demand, and made anew by whoever needs it."""

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) < x.shape[1]:
            self.table = torch.linspace(1, 2, 128, dtype=x.dtype, device=x.device)[: x.shape[1]]
        return super().forward(x) * self.table[: x.shape[1], None]


class DrawnTable(FeedForward):
    """The same from values that are drawn when the model is built."""

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) < x.shape[1]:
            self.table = self.values[: x.shape[1]].to(x)
        return super().forward(x) * self.table[: x.shape[1], None]


def with_a_table() -> nn.Module:
    model = plain()
    part = model.blocks[1].feed_forward
    part.register_buffer("table", torch.ones(0), persistent=False)
    part.__class__ = LongerTable
    return model


@pytest.mark.parametrize("seed", range(3))
def test_what_is_learnt_outside_the_state_dict_is_lost(seed: int) -> None:
    result = result_of(functools.partial(balanced, persistent=False), "persistence.round_trip", seed)
    assert result.status == "failed"
    assert "layers.1.ffn.gate.bias is changed in train mode and not saved" in result.message
    assert result_of(balanced, "persistence.round_trip", seed).status == "passed"


def test_the_diagnosis_says_that_it_is_not_saved() -> None:
    assert blamed(functools.partial(balanced, persistent=False), "persistence.round_trip") == "weights.not_saved"


def test_what_is_learnt_in_buffers_is_part_of_what_was_trained() -> None:
    specimen = Subject(balanced).open(as_loaded=True)
    batch = next_token(specimen.probe_ids(2, 12))
    made = train(specimen, [Member(1e-3, 0)], lambda step, seed: batch, 5)
    trained = made.trained(0).module.layers[1].ffn.gate
    assert 0.01 < float(trained.bias.abs().max()) < 0.06  # five steps of 0.01


def test_a_table_extended_on_demand_is_not_learnt() -> None:
    result = result_of(with_a_table, "persistence.round_trip")
    assert result.status == "passed", result.message


def test_a_table_made_from_other_values_is_not_saved() -> None:
    def made() -> nn.Module:
        model = with_a_table()
        model.blocks[1].feed_forward.values = torch.rand(128)
        model.blocks[1].feed_forward.__class__ = DrawnTable
        return model

    result = result_of(made, "persistence.round_trip")
    assert result.status == "failed"
    assert result.message.startswith("logits differ after saving and loading")


def test_state_that_is_no_buffer_is_red() -> None:
    result = result_of(kept_outside, "gradients.reach")
    assert result.status == "failed"
    assert "changes from call to call in train mode" in result.message
    assert blamed(kept_outside, "gradients.reach") == "state.carried_over"


def test_buffers_are_put_back_however_they_were_changed() -> None:
    part = nn.Module()
    part.register_buffer("in_place", torch.zeros(3))
    part.register_buffer("anew", torch.zeros(3))
    part.register_buffer("longer", torch.zeros(3), persistent=False)
    before = part.in_place
    with buffers_kept(part):
        part.in_place += 1
        part.anew = part.anew + 1
        part.longer = torch.ones(5)
    assert [(name, buffer.tolist()) for name, buffer in part.named_buffers()] == [
        (name, [0.0, 0.0, 0.0]) for name in ("in_place", "anew", "longer")
    ]
    assert part.in_place is before


# -- experts that a small batch does not choose ------------------------------------------------------------------------


class OneLess(Gate):
    """The last expert cannot be chosen."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.weight).sigmoid()
        chosen = scores[:, :-1].topk(self.args.n_activated_experts, dim=-1).indices
        weights = scores.gather(-1, chosen)
        return weights / weights.sum(-1, keepdim=True), chosen


def experts(bias: list[float] | None = None, kind: type[Gate] = Gate) -> nn.Module:
    model = build("latent")
    for layer in model.layers[1:]:
        layer.ffn.gate.__class__ = kind
        if bias is not None:
            layer.ffn.gate.bias.data.copy_(torch.tensor(bias))
    return model


TRAINED = functools.partial(experts, [0.2, -0.1, 0.05, 0.15, -0.2, 0.0])
UNEVEN = functools.partial(experts, [3.0, -2.0, 0.0, 1.0, -4.0, 2.0])
FORBIDDEN = functools.partial(experts, [0.0, 0.0, 0.0, 0.0, 0.0, -torch.inf])
MASKED = functools.partial(experts, [0.0, 0.0, 0.0, 0.0, 0.0, -1e9])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("made", [TRAINED, UNEVEN], ids=["trained", "uneven"])
def test_an_expert_that_could_be_chosen_is_not_dead(made: Build, seed: int) -> None:
    result = result_of(made, "gradients.reach", seed)
    assert result.status == "passed", result.message


@pytest.mark.parametrize(
    "made", [functools.partial(experts, kind=OneLess), FORBIDDEN, MASKED], ids=["left_out", "forbidden", "masked"]
)
def test_an_expert_that_nothing_can_choose_is_dead(made: Build) -> None:
    result = result_of(made, "gradients.reach")
    assert result.status == "failed"
    assert "a dead parameter" in result.message
    assert result.where.startswith("layers.1.ffn.experts.5.")


@pytest.mark.parametrize("where", range(3))
def test_an_expert_given_no_token_is_passed_by(where: int) -> None:
    """The first difference is sought among modules of which one answers with an empty tensor."""

    def other() -> nn.Module:
        model = FORBIDDEN()
        model.layers[where].attn.wo.register_forward_hook(lambda module, inputs, output: 1.1 * output)
        return model

    specimen = Subject(other).open()
    specimen.reference = Subject(FORBIDDEN).open(as_loaded=True)
    result = Runner(specimen, shrink=False).run(get_check("parity.hidden"))
    assert result.status == "failed"
    assert result.where.startswith(f"layers.{where} ")
    assert f"layers.{where}.attn.wo" in result.message
