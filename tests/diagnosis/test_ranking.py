"""The ranking: verdicts, suspects and probes as evidence for and against each cause. No model is built here."""

from __future__ import annotations

import pytest

from lmconform.diagnosis import diagnose
from lmconform.diagnosis.catalogue import CauseEntry, catalogue
from lmconform.diagnosis.probes import Finding, Verdict
from lmconform.diagnosis.ranking import Evidence, rank
from lmconform.results import UNMEASURED, Result, Status


def cause(id: str, shows: dict[str, str], spares: tuple[str, ...] = ()) -> CauseEntry:
    return CauseEntry(id, id, "", "", "", (), shows, frozenset(spares), ())


def red(id: str, *suspects: str) -> Result:
    return Result(
        id, id.partition(".")[0], "fault", Status.failed, measured=2.0, allowed=1.0, margin=2.0, suspects=suspects
    )


def green(id: str) -> Result:
    return Result(id, id.partition(".")[0], "fault", Status.passed)


NARROW = cause("a.narrow", {"one.x": "always"})
WIDE = cause("a.wide", {"one.x": "always", "two.y": "always"})
OTHER = cause("b.other", {"three.z": "always"}, spares=("one.x",))
ALL = [NARROW, WIDE, OTHER]


def ranked(results: list[Result], findings: tuple[Finding, ...] = (), causes: list[CauseEntry] = ALL) -> list[str]:
    return [entry.id for entry, _ in rank(causes, Evidence.of(results, findings))]


def test_nothing_red_has_no_cause() -> None:
    assert ranked([green("one.x"), green("two.y")]) == []


def test_a_green_check_speaks_against_a_cause_that_would_turn_it_red() -> None:
    assert ranked([red("one.x"), green("two.y")])[0] == "a.narrow"


def test_a_red_check_speaks_for_the_cause_that_explains_it() -> None:
    assert ranked([red("one.x"), red("two.y")])[0] == "a.wide"


@pytest.mark.parametrize("status", [Status.blocked, Status.not_applicable, Status.not_run, Status.xfailed])
def test_what_did_not_run_or_was_expected_says_nothing(status: Status) -> None:
    silent = Result("two.y", "two", "fault", status)
    with_silent = rank(ALL, Evidence.of([red("one.x"), silent]))
    without = rank(ALL, Evidence.of([red("one.x")]))
    assert [(entry.id, score) for entry, score in with_silent] == [(entry.id, score) for entry, score in without]


@pytest.mark.parametrize(
    ("message", "speaks"),
    [
        (f"{UNMEASURED}IndexError: no such row (at lmconform's loss.py:2)", False),
        ("the process ended with exit code 1", False),
        ("the model raised IndexError: no such row (at model.py:12, in forward)", True),
    ],
    ids=["of_lmconform", "of_the_process", "of_the_model"],
)
def test_an_error_is_evidence_only_where_the_model_raised_it(message: str, speaks: bool) -> None:
    error = Result("two.y", "two", "fault", Status.error, message=message, suspects=("b.other",))
    with_error = rank(ALL, Evidence.of([red("one.x"), error]))
    without = rank(ALL, Evidence.of([red("one.x")]))
    same = [(entry.id, score) for entry, score in with_error] == [(entry.id, score) for entry, score in without]
    assert same is not speaks


def test_a_report_whose_only_error_is_lmconforms_own_has_no_cause() -> None:
    assert diagnose([Result("two.y", "two", "fault", Status.error, message=f"{UNMEASURED}KeyError: 'x'")]) == []


def test_a_suspect_named_by_the_check_outweighs_an_equal_cause() -> None:
    twins = [cause("a.first", {"one.x": "always"}), cause("a.second", {"one.x": "always"})]
    assert ranked([red("one.x", "a.second")], causes=twins)[0] == "a.second"


@pytest.mark.parametrize(("verdict", "first"), [(Verdict.cured, "a.second"), (Verdict.against, "a.first")])
def test_a_probe_decides_between_causes_with_equal_verdicts(verdict: Verdict, first: str) -> None:
    twins = [cause("a.first", {"one.x": "always"}), cause("a.second", {"one.x": "always"})]
    assert ranked([red("one.x")], (Finding("a.second", verdict),), causes=twins)[0] == first


def test_a_place_says_nothing_of_the_likelihood() -> None:
    plain = rank(ALL, Evidence.of([red("one.x")]))
    placed = rank(ALL, Evidence.of([red("one.x")], (Finding("a.wide", Verdict.place, "block 1"),)))
    assert [score for _, score in plain] == [score for _, score in placed]


def test_what_the_first_cause_leaves_unexplained_names_the_second() -> None:
    rivals = [*ALL, cause("a.near", {"one.x": "often", "two.y": "often"})]
    assert ranked([red("one.x"), red("two.y"), red("three.z", "b.other")], causes=rivals)[:2] in (
        ["a.wide", "b.other"],
        ["b.other", "a.wide"],
    )


def test_scores_are_shares_of_one() -> None:
    scores = [score for _, score in rank(catalogue().values(), Evidence.of([red("loss.reference")]), most=500)]
    assert all(0 <= score <= 1 for score in scores)
    assert sum(scores) <= 1 + 1e-9


def test_worst_comes_first() -> None:
    scores = [cause.score for cause in diagnose([red("causality.no_future_leak", "mask.soft")])]
    assert scores == sorted(scores, reverse=True)


def test_a_red_report_without_a_model_at_hand_is_ranked_from_its_results() -> None:
    causes = diagnose([red("tokenizer.bounds", "tokenizer.ids_out_of_range")], spec="model.py:build")
    assert causes[0].id == "tokenizer.ids_out_of_range"
    assert "{spec}" not in causes[0].confirm
