"""A snapshot catches subtle faults, names the place where they begin, and says what they look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.faults import all_faults
from fixtures.planting import around
from lmconform import Subject
from lmconform.snapshots.comparison import Comparison, Finding, compare
from lmconform.snapshots.taking import observe, take

FAULTS = {fault.id: fault for fault in all_faults()}


def behaviour(comparison: Comparison) -> Finding:
    assert not comparison.ok
    return next(finding for finding in comparison.findings if finding.kind == "behaviour")


@pytest.mark.parametrize(
    ("fault", "where", "says"),
    [
        ("parity.tanh_gelu", "in blocks.1", "blocks.1.feed_forward.up, which ends before it, agrees"),
        ("parity.exact_gelu", "in transformer.h.0", "transformer.h.0.mlp.act is the first module"),
        ("parity.other_epsilon", "after the last block", "an epsilon"),
        ("parity.epsilon_in_a_block", "in gpt_neox.layers.1", "gpt_neox.layers.1.input_layernorm is the first module"),
        ("parity.neighbours_turned", "in blocks.0", "what mixes or encodes positions"),
        ("parity.neighbours_in_one_layer", "in blocks.2", "what mixes or encodes positions"),
        ("parity.groups_tiled_in_one_layer", "in blocks.1", "blocks.1.attention.v, which ends before it, agrees"),
        ("parity.logits_scaled", "after the last block", "head"),
        ("parity.embedding_scaled", "before the first block", "embedding"),
        ("parity.detached", "in the gradient of blocks.1.attention.v", "logits agree and gradients do not"),
        ("parity.block_left_out", "the number of blocks is another", "the snapshot's weights do not fit"),
        ("positions.one_head_not_turned", "in blocks.2", "position 0, which sees itself only, agrees"),
        ("positions.angles_clamped", "in blocks.0", "positions 0 to 119 agree"),
        ("positions.last_two_alike", "in blocks.1", "positions 0 to 126 agree"),
        ("positions.default_from_one", "before the first block", "position table"),
        ("positions.default_restarts", "in blocks.0", "positions 0 to 95 agree"),
        ("positions.given_rescaled", "in positioned logits", "how given positions are used"),
    ],
)
def test_planted_fault_is_caught_and_placed(
    against: Callable[..., Comparison], fault: str, where: str, says: str
) -> None:
    planted = FAULTS[fault]
    found = behaviour(against(planted.host, planted.plant))
    assert where in found.where
    assert says in found.message


def one_head_scaled(model: Any) -> None:
    """Head 2 of block 1 is a thousandth too large where it enters the output projection."""

    def forward(original: Any, x: Tensor) -> Tensor:
        factor = torch.ones(48, dtype=x.dtype)
        factor[24:36] = 1.001
        return original(x * factor)

    around(model.blocks[1].attention.o, forward)


def two_heads_swapped(model: Any) -> None:
    def forward(original: Any, x: Tensor) -> Tensor:
        return original(torch.cat([x[..., 12:24], x[..., :12], x[..., 24:]], dim=-1))

    around(model.blocks[2].attention.o, forward)


def one_position_off_by_one(model: Any) -> None:
    def positions(original: Any, *args: Any) -> Tensor:
        found = original(*args)
        return found + (found == 7)

    around(model, positions, "positions")


def rms_epsilon(model: Any) -> None:
    model.model.layers[1].post_attention_layernorm.variance_epsilon = 1e-5


def window_one_more(model: Any) -> None:
    model.config.sliding_window += 1


@pytest.mark.parametrize(
    ("host", "plant", "where", "says"),
    [
        ("plain", one_head_scaled, "in blocks.1", "blocks.1.attention.o is the first module"),
        ("plain", two_heads_swapped, "in blocks.2", "blocks.2.attention.o is the first module"),
        ("plain", one_position_off_by_one, "in blocks.0", "positions 0 to 6 agree"),
        ("llama", rms_epsilon, "in model.layers.1", "post_attention_layernorm is the first module"),
        ("mistral", window_one_more, "in model.layers.0", "positions 0 to 15 agree"),
    ],
    ids=["one-head-scaled", "two-heads-swapped", "one-position-off", "rms-epsilon", "window"],
)
def test_smallest_slip_is_caught_and_placed(
    against: Callable[..., Comparison], host: str, plant: Callable[[Any], None], where: str, says: str
) -> None:
    found = behaviour(against(host, plant))
    assert where in found.where
    assert says in found.message


@pytest.mark.parametrize("fault", ["parity.transposed", "parity.slice_off_by_one", "parity.heads_in_another_order"])
def test_wrong_numbers_in_a_checkpoint_are_named_with_as_loaded(against: Callable[..., Comparison], fault: str) -> None:
    planted = FAULTS[fault]
    found = against(planted.host, planted.plant, as_loaded=True)
    weights = next(finding for finding in found.findings if finding.kind == "weights")
    assert weights.message.startswith("1 of")
    assert not against(planted.host, planted.plant, as_loaded=True, ignored=("weights",)).ok  # behaviour differs too


def test_other_initialisation_is_told_before_behaviour_and_explains_it(against: Callable[..., Comparison]) -> None:
    def initialise(model: Any) -> None:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)

    found = against("plain", initialise, as_loaded=True)
    weights, first = found.findings[:2]
    assert weights.kind == "weights"
    assert "without --as-loaded lmconform draws the weights" in weights.message
    assert first.kind == "behaviour"
    assert "not the snapshot's (weights, above)" in first.message
    assert "position table" not in first.message  # no place in the code is blamed


class Normed(nn.Module):
    """A norm behind the embedding, as Bloom has it, and one in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 16)
        self.embedding_norm = nn.LayerNorm(16)
        self.rates = nn.Parameter(torch.arange(1.0, 17.0).log())
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 31)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embedding_norm(self.embedding(idx))
        return self.head(x + self.down(torch.tanh(self.up(self.norm(x)))) * torch.exp(-self.rates))


def changed_since(change: Callable[[Any], object]) -> Comparison:
    def changed() -> nn.Module:
        model = Normed()
        change(model)
        return model

    snapshot = take(Subject(Normed, name="normed"))
    return compare(snapshot, observe(Subject(changed, name="normed"), snapshot))


def test_epsilon_is_felt_behind_a_norm_of_the_embedding() -> None:
    found = behaviour(changed_since(lambda model: setattr(model.norm, "eps", 1e-6)))
    assert "an epsilon" in found.message
    assert found.size is not None
    assert found.allowed is not None
    assert found.size > 10 * found.allowed


def test_what_the_builder_computes_is_told_as_weights_where_it_changes() -> None:
    found = changed_since(lambda model: model.rates.data.mul_(1.01))
    assert [finding.kind for finding in found.findings[:2]] == ["weights", "behaviour"]
    assert found.findings[0].message.startswith("1 of 12 parameters hold other numbers: rates")
    assert "look at how the model is initialised" in found.findings[0].message


def test_drawn_weights_do_not_depend_on_the_checkpoints_numbers(against: Callable[..., Comparison]) -> None:
    assert against("plain", FAULTS["parity.transposed"].plant).ok


def test_cached_steps_at_wrong_positions_are_told_from_the_forward(against: Callable[..., Comparison]) -> None:
    def restart(model: Any) -> None:
        def positions(original: Any, mask: Any, batch: int, past: int, time: int, device: Any) -> Tensor:
            return original(None, batch, 0, time, device) if past else original(mask, batch, past, time, device)

        around(model, positions, "positions")

    found = behaviour(against("plain", restart))
    assert found.where == "in cached logits"
    assert "without a cache everything agrees" in found.message


def test_lost_tie_shows_in_the_inventory_and_in_gradients(against: Callable[..., Comparison]) -> None:
    def untie(model: Any) -> None:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())

    found = against("gpt2", untie, ignored=("inventory",))
    assert "no longer tied: lm_head.weight, transformer.wte.weight" in [f.message for f in found.findings]
    assert behaviour(found).where == "in the gradient of transformer.wte.weight"


def test_subject_that_lost_its_cache_and_mask_fails(against: Callable[..., Comparison]) -> None:
    class Bare(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids).logits

    found = against("plain", Bare)
    gone = [finding.where for finding in found.findings if "it is no more" in finding.message]
    assert gone == ["padded/logits", "positioned/logits", "cached/logits", "loss"]
