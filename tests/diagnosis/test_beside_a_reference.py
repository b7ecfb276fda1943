"""Beside a reference, how attention differs is measured: its groups of heads, and the scale of its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.faults import Fault, all_faults
from fixtures.faults.held_out_reported import attention
from fixtures.planting import around
from fixtures.subjects import build
from lmconform import Subject
from lmconform.diagnosis import diagnose
from lmconform.diagnosis.probes import Finding, Verdict, reference
from lmconform.measuring.head_sharing import dealt_otherwise
from lmconform.registry import get_check
from lmconform.results import Cause, Result
from lmconform.runner import Runner

FAULTS: dict[str, Fault] = {fault.id: fault for fault in (*all_faults(), *attention.FAULTS)}
BESIDE = ("parity.logits", "parity.hidden", "parity.scale", "parity.transfer", "parity.gradients")
SCALE, GROUPS = "parity.scale_of_head_dim", "parity.groups_in_turn"
IN_TURN = "keys and values handed to the query heads as in the reference (0 0 1 1 in place of 0 1 0 1)"


def checked(id: str, checks: tuple[str, ...]) -> tuple[dict[str, Result], list[Cause]]:
    runner = Runner(FAULTS[id].open(), shrink=False)
    results = [runner.run(get_check(check)) for check in checks]
    return {result.id: result for result in results}, diagnose(results, runner)


@pytest.mark.parametrize("checks", [BESIDE[:1], (*BESIDE, "scale.attention")], ids=["logits", "all"])
@pytest.mark.parametrize(
    ("id", "where"),
    [(SCALE, "attention scores of block 0 are 1.155 times the reference's; with the factor"), (GROUPS, IN_TURN)],
    ids=["scale", "groups"],
)
def test_what_differs_in_attention_is_the_cause(id: str, where: str, checks: tuple[str, ...]) -> None:
    _, causes = checked(id, checks)
    assert causes[0].id == FAULTS[id].cause
    assert where in causes[0].where
    assert "the logits agree to" in causes[0].where
    assert causes[0].score > 0.9
    assert all(cause.score < 0.05 for cause in causes[1:])


def test_groups_dealt_otherwise_are_what_the_checks_say() -> None:
    results, _ = checked(GROUPS, BESIDE)
    red = [result for result in results.values() if result.status == "failed"]
    assert {result.id for result in red} >= {"parity.logits", "parity.hidden", "parity.transfer"}
    assert all(IN_TURN in result.message and result.suspects == ("attention.kv_groups",) for result in red)


@pytest.mark.parametrize(
    ("id", "place"),
    [
        (GROUPS, "layers.0.attn.qkv.weight"),
        ("parity.halves_for_pairs", "layers.0.mlp.gate_up"),
        ("parity.queries_dealt_in_turn", "model.layers.0.self_attn.q_proj.weight"),
        ("parity.halves_taken_in_turn", "backbone.layers.0.mixer.in_proj.weight"),
    ],
)
def test_a_weight_behind_the_fault_is_not_blamed(id: str, place: str) -> None:
    assert checked(id, ("parity.transfer",))[0]["parity.transfer"].where == place


def test_what_one_token_shows_is_not_said_to_spare_attention() -> None:
    message = checked("parity.queries_dealt_in_turn", BESIDE[:1])[0]["parity.logits"].message
    assert "the first position differs already" in message
    assert "values and the heads that they reach" in message


# -- groups ------------------------------------------------------------------------------------------------------------


class Grouped(nn.Module):
    """Six query heads on three of keys and values; `spread` expands these, `product` multiplies."""

    def __init__(self, product: str, spread: Callable[[Tensor], Tensor], keys_alone: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.product, self.spread, self.keys_alone = product, spread, keys_alone
        self.embedding, self.qkv = nn.Embedding(64, 24), nn.Linear(24, 48)
        self.out, self.head = nn.Linear(24, 24), nn.Linear(24, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.qkv(x).split([24, 12, 12], dim=-1))
        k, v = self.spread(k), (runs if self.keys_alone else self.spread)(v)
        if self.product == "sdpa":
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.head(self.out(y.transpose(1, 2).flatten(2)))
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        if self.product == "einsum":
            scores = torch.einsum("bhqd,bkhd->bhqk", q, k.transpose(1, 2)).masked_fill(hidden, -torch.inf)
            y = torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v).flatten(2)
        elif self.product == "bmm":
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).masked_fill(hidden, -torch.inf)
            y = torch.bmm(scores.softmax(-1), v.flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2).flatten(2)
        else:
            scores = (q @ k.transpose(-2, -1)).masked_fill(hidden, -torch.inf)
            y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(self.out(y))


def runs(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=1)


def in_turn(x: Tensor) -> Tensor:
    return x.repeat(1, 2, 1, 1)


@pytest.mark.parametrize("keys_alone", [False, True], ids=["both", "keys"])
@pytest.mark.parametrize("product", ["matmul", "einsum", "bmm", "sdpa"])
@pytest.mark.parametrize("time", [4, 9])  # 4 is the size of a head as well
def test_groups_are_read_off_any_product_and_dealt_as_in_the_reference(
    product: str, keys_alone: bool, time: int
) -> None:
    ours = Subject(lambda: Grouped(product, in_turn, keys_alone)).open()
    theirs = Subject(lambda: Grouped(product, runs)).open()
    ids = torch.arange(2 * time).view(2, time)
    expected = theirs.logits(ids)
    assert not torch.allclose(ours.logits(ids), expected, atol=1e-5)
    found = dealt_otherwise(ours, theirs, ids)
    assert found is not None
    assert f"{'keys' if keys_alone else 'keys and values'} handed to the query heads" in found.text
    assert "(0 0 1 1 2 2 in place of 0 1 2 0 1 2)" in found.text
    with found.applied():
        assert torch.allclose(ours.logits(ids), expected, atol=1e-6)


@pytest.mark.parametrize("host", ["plain", "mistral", "sinks", "local_global", "bloom", "gpt2"])
def test_a_model_deals_its_groups_as_itself(host: str) -> None:
    ours, theirs = (Subject(lambda: build(host)).open() for _ in range(2))
    assert dealt_otherwise(ours, theirs, ours.probe_ids(2, 9)) is None


def test_heads_in_another_order_are_no_other_groups() -> None:
    theirs = Subject(lambda: Grouped("matmul", runs)).open()
    ours = Subject(lambda: Grouped("matmul", lambda x: runs(x.flip(1)))).open()
    assert dealt_otherwise(ours, theirs, torch.arange(18).view(2, 9)) is None


# -- scale -------------------------------------------------------------------------------------------------------------


def told(host: str, plant: Callable[[Any], None]) -> dict[str, Finding]:
    def planted() -> Any:
        model = build(host)
        plant(model)
        return model

    subject = Subject(planted).open()
    subject.reference = Subject(lambda: build(host)).open(as_loaded=True)
    return {finding.cause: finding for finding in reference.probe(subject, 0)}


def scaled_by_depth(model: Any) -> None:
    for depth, layer in enumerate(model.layers):

        def placed(original: Any, x: Tensor, norm: Any, turn: Any, by: float = 1.0 / (depth + 1)) -> Tensor:
            return original(x, norm, turn) * (by if norm is original.args[0].q_norm else 1.0)

        around(layer.self_attn, placed, "placed")


def scaled_beside_a_sink(model: Any) -> None:
    def weigh(original: Any, scores: Tensor, may: Tensor) -> Tensor:
        return original(scores * 3.0, may)

    for layer in model.layers:
        around(layer.attn, weigh, "weigh")


@pytest.mark.parametrize(
    ("host", "plant", "where"),
    [
        ("local_global", scaled_by_depth, "block 1 are 0.5 times"),
        ("sinks", scaled_beside_a_sink, "block 0 are 3 times"),
    ],
    ids=["by_depth", "beside_a_sink"],
)
def test_a_factor_of_the_scores_is_undone_block_by_block(host: str, plant: Callable[[Any], None], where: str) -> None:
    found = told(host, plant)
    assert found["attention.unscaled"].verdict == Verdict.cured
    assert where in found["attention.unscaled"].where
    assert found["position.layout"].verdict == Verdict.ruled_out


def test_a_factor_that_leaves_a_difference_is_seen_and_no_cure() -> None:
    def scaled_and_shifted(model: Any) -> None:
        scaled_beside_a_sink(model)
        around(model.norm, lambda original, x: original(x) + 0.01)

    assert told("sinks", scaled_and_shifted)["attention.unscaled"].verdict == Verdict.seen
