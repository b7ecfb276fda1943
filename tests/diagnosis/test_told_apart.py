"""Causes that explain the same red checks are told apart by a measurement, which accuses no sound model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fixtures.faults import all_faults
from fixtures.subjects import build
from fixtures.subjects.generating import plain_generating
from lmconform import Subject
from lmconform.diagnosis import diagnose
from lmconform.diagnosis.probes import Finding, Verdict, dead, decoding, encoding, padded_steps, untrained
from lmconform.measuring.generate_calls import Call, calls_recorded, unlike_plain_calls
from lmconform.measuring.generating import Generator
from lmconform.registry import get_check
from lmconform.results import Cause, Result
from lmconform.runner import Runner
from lmconform.specimen import Specimen

FAULTS = {fault.id: fault for fault in all_faults()}


def checked(id: str) -> tuple[dict[str, Result], list[Cause]]:
    """The planted fault under the checks that must see it, and what is made of that."""
    runner = Runner(FAULTS[id].open(), shrink=False)
    results = [runner.run(get_check(check)) for check in FAULTS[id].kills]
    return {result.id: result for result in results}, diagnose(results, runner)


@pytest.mark.parametrize(
    ("id", "not_first"),
    [
        ("generation.never_said_before", "generation.inputs_differ"),
        ("generation.coarse_cache", "generation.inputs_differ"),
        ("gradients.result_thrown_away", "grad.vanishing"),
        ("init.embedding_of_zeros", "init.residual_scaling"),
        ("parity.scaled_before_the_cap", "scale.hidden"),
        ("parity.halves_taken_in_turn", "weights.not_loaded"),
        ("parity.gain_applied_twice", "grad.wrong"),
        ("cache.whole_pages", "cache.truncated"),
        ("cache.state_one_chunk_late", "cache.truncated"),
        ("cache.state_normalised", "cache.stale"),
        ("cache.heads_of_a_step", "position.restarts_on_decode"),
        ("positions.keys_scaled_behind_turning", "position.one_side_rotated"),
    ],
)
def test_what_was_measured_names_the_cause(id: str, not_first: str) -> None:
    results, causes = checked(id)
    assert FAULTS[id].says in results[FAULTS[id].kills[0]].message
    assert causes[0].id == FAULTS[id].cause
    assert all(cause.score < causes[0].score / 3 for cause in causes if cause.id == not_first)


@pytest.mark.parametrize(
    ("id", "where"),
    [
        ("parity.halves_taken_in_turn", "in_proj.weight: its 256 entries lie in halves and are read in turns"),
        ("parity.gain_applied_twice", "post_attention_layernorm.weight moved alike in both, the logits differ"),
        ("cache.whole_pages", "keys in a step on the cache, at 16 in one forward"),
        ("cache.state_one_chunk_late", "differs from its token 16 on, wherever in the text that call begins"),
        ("cache.heads_of_a_step", "what block 1 keeps after the step is what one forward leaves there"),
        ("gradients.result_thrown_away", "layers.1: forward() uses none of its parameters"),
        ("positions.keys_scaled_behind_turning", "with one gain for all channels in blocks.0.attention.key_norm"),
    ],
)
def test_the_entry_says_what_was_measured(id: str, where: str) -> None:
    assert where in checked(id)[1][0].where


@pytest.mark.parametrize(
    ("id", "text"),
    [
        ("generation.frozen_positions", "in step 1 forward() is given positions [0], where the tokens stand at"),
        ("generation.positions_from_one", "in step 0 forward() is given positions"),
        ("generation.token_twice", "and not those that are not in its cache yet"),
        ("generation.short_crop", "and not all so far"),
        ("generation.never_said_before", "two calls of generate() on the same prompt give other tokens"),
        ("generation.coarse_cache", "gives forward() the tokens, positions and mask that a plain loop gives"),
        ("generation.index_for_token", "gets the logits of plain forwards, and takes another token than the likeliest"),
    ],
)
def test_greedy_says_what_generate_hands_over(id: str, text: str) -> None:
    result = Runner(FAULTS[id].open(), shrink=False).run(get_check("generation.greedy"))
    assert text in result.message


@pytest.mark.parametrize("host", ["own", "gpt2", "mistral", "mamba", "speedrun"])
def test_a_sound_generate_hands_over_what_a_plain_loop_does(host: str) -> None:
    subject = Subject(plain_generating if host == "own" else lambda: build(host)).open()
    ids = subject.probe_ids(2, 7)
    with calls_recorded(subject) as calls:
        made = Generator(subject).greedy(ids, 4)
    assert unlike_plain_calls(subject, calls, ids, made) == ""
    plain = subject.logits(torch.cat([ids, made], dim=1))[:, 6:-1]
    for step, call in enumerate(calls):
        assert torch.allclose(call.logits, plain[:, step], atol=1e-4)


@pytest.mark.parametrize(
    ("cached", "given", "alike"),
    [
        (True, "new", True),  # a cache
        (True, "all", False),  # all tokens once more, on top of a cache
        (None, "new", True),  # a state in a tensor, or a number of the place to go on from
        (None, "all", True),
        (False, "all", True),  # no cache
        (False, "new", False),  # the last token alone, without a past
    ],
)
def test_a_step_gets_the_tokens_that_are_not_in_its_cache(cached: bool | None, given: str, alike: bool) -> None:
    subject = Subject(lambda: build("plain")).open()
    prompt, made = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])
    step = made[:, :1] if given == "new" else torch.cat([prompt, made[:, :1]], dim=1)
    calls = [Call(ids, None, None, cached, torch.zeros(1, 3)) for ids in (prompt, step)]
    assert (unlike_plain_calls(subject, calls, prompt, made) == "") == alike


def test_a_control_is_not_blamed_for_what_forward_does() -> None:
    runner = Runner(FAULTS["causality.qk_norm_over_time"].open(), shrink=False)
    assert runner.run(get_check("generation.controls")).status == "passed"


def accusing(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.verdict in (Verdict.seen, Verdict.cured)]


@pytest.mark.parametrize("host", ["plain", "mistral", "mamba", "gated_linear", "sinks", "latent", "ported_llama"])
@pytest.mark.parametrize("probe", [decoding.probe, dead.probe, padded_steps.probe], ids=["steps", "dead", "padding"])
def test_probes_accuse_no_sound_model(host: str, probe: Callable[[Specimen, int], list[Finding]]) -> None:
    assert accusing(probe(Subject(lambda: build(host)).open(), 0)) == []


@pytest.mark.parametrize("host", ["llama", "mamba", "latent"])
def test_a_model_that_is_its_own_reference_uses_no_weight_otherwise(host: str) -> None:
    subject = Subject(lambda: build(host)).open()
    subject.reference = Subject(lambda: build(host)).open(as_loaded=True)
    assert accusing(untrained.probe(subject, 0)) == []


def test_a_norm_in_front_of_the_rotation_is_not_blamed() -> None:
    def one_base_for_keys(model: Any) -> Any:
        return FAULTS["positions.other_base_for_keys"].plant(model) or model

    broken = Subject(lambda: one_base_for_keys(build("plain"))).open()
    assert "one gain" not in " ".join(finding.where for finding in encoding.shift(broken, 0))
