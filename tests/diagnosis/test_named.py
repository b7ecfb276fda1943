"""What a user gets to read: the right cause first, with figures, the place, and commands that can be pasted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

import pytest

from fixtures.faults import Fault, all_faults
from lmconform import Subject
from lmconform.cli import build_parser
from lmconform.diagnosis import diagnose, probes
from lmconform.registry import get_check, select_checks
from lmconform.results import Cause, Result
from lmconform.runner import Runner
from lmconform.subject import as_subject

Diagnosed = Callable[[str], tuple[list[Result], list[Cause]]]

FAULTS = {fault.id: fault for fault in all_faults()}
REPRESENTATIVE = (
    "causality.tril_plus_one",
    "causality.no_causal_mask",
    "batching.mean_over_batch",
    "padding.mask_ignored_in_one_layer",
    "cache.positions_restart",
    "cache.steps_not_stored",
    "loss.unshifted",
    "positions.not_turned",
    "contract.dropout_in_eval",
)


def checked(subject: Subject, families: tuple[str, ...] = ()) -> tuple[list[Result], list[Cause]]:
    runner = Runner(subject.open(), profile="smoke", shrink=False)
    results = [runner.run(check) for check in select_checks("smoke", families)]
    return results, diagnose(results, runner)


@pytest.fixture(scope="module")
def diagnosed() -> Diagnosed:
    known: dict[str, tuple[list[Result], list[Cause]]] = {}

    def run(id: str) -> tuple[list[Result], list[Cause]]:
        if id not in known:
            known[id] = checked(FAULTS[id].subject())
        return known[id]

    return run


@pytest.mark.parametrize("id", REPRESENTATIVE)
def test_names_the_cause_first(diagnosed: Diagnosed, id: str) -> None:
    _, causes = diagnosed(id)
    assert causes[0].id == FAULTS[id].cause


@pytest.mark.parametrize("id", REPRESENTATIVE)
def test_evidence_is_red_checks_with_their_figures(diagnosed: Diagnosed, id: str) -> None:
    results, causes = diagnosed(id)
    red = {result.id: result for result in results if result.status in ("failed", "warned", "error")}
    assert causes[0].evidence
    for item in causes[0].evidence:
        assert (item["measured"], item["allowed"]) == (red[item["check"]].measured, red[item["check"]].allowed)


@pytest.mark.parametrize("id", REPRESENTATIVE)
def test_confirmation_can_be_pasted(diagnosed: Diagnosed, id: str) -> None:
    _, causes = diagnosed(id)
    assert all("{" not in cause.confirm for cause in causes)
    for cause in causes:
        for command in re.findall(r"lmconform (check \S+(?: --[a-z-]+ [^\s;]+)*)", cause.confirm):
            words = shlex.split(command.rstrip(".,:"))
            assert build_parser(words).parse_args(words).specs == [words[1]]


@pytest.mark.parametrize(
    ("id", "text"),
    [
        ("cache.positions_restart", "with explicit position_ids the cached step is right"),
        ("cache.steps_not_stored", "nothing was stored"),
        ("causality.no_causal_mask", "with a causal mask imposed on its attention from outside, the leak falls"),
    ],
)
def test_says_what_undoing_the_suspected_fault_did(diagnosed: Diagnosed, id: str, text: str) -> None:
    _, causes = diagnosed(id)
    assert text in causes[0].where


@pytest.mark.parametrize(
    "id",
    [
        "parity.neighbours_turned", "parity.groups_tiled", "parity.exact_gelu", "positions.exponent_halved",
        "scale.by_width",
    ],
)  # fmt: skip
def test_a_repaired_copy_that_equals_the_reference_names_the_cause(id: str) -> None:
    runner = Runner(FAULTS[id].open(), profile="smoke", shrink=False)
    results = [runner.run(check) for check in select_checks("default", ["parity"])]
    cause = diagnose(results, runner)[0]
    assert cause.id == FAULTS[id].cause
    assert "the logits agree to" in cause.where


@pytest.mark.parametrize(
    ("id", "check", "text"),
    [
        ("positions.queries_not_turned", "positions.shift", "moving it by 1 changes the logits"),
        ("positions.other_base_for_keys", "positions.shift", "moving it by 1 changes the logits"),
        ("positions.slope_doubled", "parity.hidden", "depends on the places of query and key and not on the text"),
        ("positions.angles_kept_by_shape", "cache.decode", "in a model that has answered nothing before"),
        ("cache.key_before_overwritten", "cache.decode", "off what one forward leaves there"),
        ("cache.state_begins_anew", "cache.decode", "it is not read"),
        ("precision.eager_unscaled", "precision.backends", "are sqrt(16) times the other's"),
        ("loss.in_half", "loss.reference", "of logits in bfloat16 it is the cross-entropy"),
    ],
)
def test_a_probe_measures_what_tells_the_cause_from_its_like(id: str, check: str, text: str) -> None:
    runner = Runner(FAULTS[id].open(), profile="smoke", shrink=False)
    cause = diagnose([runner.run(get_check(check))], runner)[0]
    assert cause.id == FAULTS[id].cause
    assert text in cause.where


@pytest.mark.parametrize(
    ("one", "other"),
    [("cache.positions_restart", "loss.unshifted"), ("causality.tril_plus_one", "batching.mean_over_batch")],
)
def test_two_faults_at_once_are_both_among_the_first_three(one: str, other: str) -> None:
    first, second = FAULTS[one], FAULTS[other]

    def build() -> object:
        module = first.drawn()
        return second.plant(module) or module

    _, causes = checked(Subject(build))
    assert {first.cause, second.cause} <= {cause.id for cause in causes[:3]}


@pytest.mark.parametrize("spec", ["fixtures/subjects/plain.py:plain", "transformers:llama"])
def test_a_sound_model_has_no_causes_and_no_probe_runs(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object) -> list[probes.Finding]:
        raise AssertionError("a probe ran on a green report")

    monkeypatch.setattr(probes, "PROBES", tuple((checks, never) for checks, _ in probes.PROBES))
    _, causes = checked(as_subject(spec))
    assert causes == []


def test_a_probe_that_fails_leaves_the_verdicts_to_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> list[probes.Finding]:
        raise RuntimeError("out of order")

    monkeypatch.setattr(probes, "PROBES", tuple((checks, broken) for checks, _ in probes.PROBES))
    fault: Fault = FAULTS["causality.tril_plus_one"]
    _, causes = checked(fault.subject(), ("causality", "contract"))
    assert causes[0].id == fault.cause
