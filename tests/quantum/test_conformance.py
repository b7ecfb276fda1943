"""The whole suite on the quantum model, with and without the interference layer, and with its balanced loss."""

from __future__ import annotations

from typing import Any

import pytest

import lmconform
from fixtures.subjects.quantum import quantum, quantum_interference

pytestmark = pytest.mark.quantum

TRAINING = ["training", "collapse"]
BOTH = [quantum, quantum_interference]


@lmconform.parametrize_with_checks([quantum_interference], deselect=TRAINING)
def test_conforms(subject: Any, check: Any) -> None:
    check(subject)


@lmconform.parametrize_with_checks([quantum_interference], device="sim", profile="smoke", deselect=TRAINING)
def test_conforms_on_the_simulated_accelerator(subject: Any, check: Any) -> None:
    check(subject)


@pytest.mark.slow
@lmconform.parametrize_with_checks([quantum], deselect=TRAINING)
def test_conforms_without_interference(subject: Any, check: Any) -> None:
    check(subject)


@pytest.mark.slow
@lmconform.parametrize_with_checks(BOTH, device="sim", deselect=TRAINING)
def test_default_on_the_simulated_accelerator(subject: Any, check: Any) -> None:
    check(subject)


@pytest.mark.slow
@lmconform.parametrize_with_checks(BOTH, select=TRAINING)
def test_trains(subject: Any, check: Any) -> None:
    check(subject)


@pytest.mark.slow
@lmconform.parametrize_with_checks(BOTH, device="sim", select=TRAINING)
def test_trains_on_the_simulated_accelerator(subject: Any, check: Any) -> None:
    check(subject)
