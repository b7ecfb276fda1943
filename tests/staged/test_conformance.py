"""The whole suite on every stage, with a plain embedding and with MU's matrix."""

from __future__ import annotations

from typing import Any

import pytest

import lmconform
from fixtures.subjects.staged import ALL, FULL, HALF_CLOSED, PLAIN, RECIPE
from lmconform import Subject, check_model

TRAINING = ["training", "collapse"]
FAST = [PLAIN[0], PLAIN[1], PLAIN[3], FULL[0], HALF_CLOSED]
RED = ("failed", "error", "warned", "not_run", "blocked", "xfailed", "xpassed")


@lmconform.parametrize_with_checks([FULL[3]], deselect=TRAINING)
def test_conforms(subject: Any, check: Any) -> None:
    check(subject)


@pytest.mark.parametrize("subject", FAST, ids=lambda subject: subject.name)
def test_smoke(subject: Subject, device: str) -> None:
    green(subject, device, profile="smoke")


@pytest.mark.slow
@pytest.mark.parametrize("subject", ALL, ids=lambda subject: subject.name)
def test_default_with_training(subject: Subject, device: str) -> None:
    green(subject, device, profile="default")


def test_sees_positions_with_and_without_the_matrix() -> None:
    """The checks of positions apply: MU mixes tokens in front of the operators and must count as a block."""
    for subject in (PLAIN[0], FULL[0]):
        report = check_model(subject, select=["contract.shape", "contract.finite", "contract.repeatable", "positions"])
        assert {result.status for result in report.results} == {"passed"}


@lmconform.parametrize_with_checks([RECIPE], select=["tokenizer", "training.schedule", "training.optimizer"])
def test_recipe_conforms(subject: Any, check: Any) -> None:
    check(subject)


def green(subject: Subject, device: str, *, profile: str) -> None:
    report = check_model(subject, profile=profile, device=device)
    found = [f"{result.id}: {result.message}" for result in report.results if result.status in RED]
    assert report.ok, "\n".join(found)
    assert not found, "\n".join(found)
