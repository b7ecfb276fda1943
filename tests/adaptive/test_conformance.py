"""The whole suite on the adaptive model: as built, from GPT-2 beside GPT-2, with skips, with heads removed."""

from __future__ import annotations

from typing import Any

import pytest

import lmconform
from fixtures.subjects.adaptive import (
    adaptive,
    adaptive_from_gpt2,
    adaptive_pruned,
    adaptive_pruned_skips,
    adaptive_skips,
    gpt2,
)

pytestmark = pytest.mark.adaptive

TRAINING = ["training", "collapse"]
VARIANTS = [adaptive_skips, adaptive_pruned, adaptive_pruned_skips]


@lmconform.parametrize_with_checks([adaptive])
def test_conforms(subject: Any, check: Any) -> None:
    check(subject)


@lmconform.parametrize_with_checks([adaptive], device="sim", deselect=TRAINING)
def test_conforms_on_the_simulated_accelerator(subject: Any, check: Any) -> None:
    check(subject)


@pytest.mark.slow
@lmconform.parametrize_with_checks([adaptive], device="sim", select=TRAINING)
def test_trains_on_the_simulated_accelerator(subject: Any, check: Any) -> None:
    check(subject)


@lmconform.parametrize_with_checks([adaptive_pruned_skips], deselect=TRAINING)
def test_conforms_pruned_and_with_skips(subject: Any, check: Any) -> None:
    check(subject)


@pytest.mark.slow
@lmconform.parametrize_with_checks([adaptive_skips, adaptive_pruned], deselect=TRAINING)
def test_variants_conform(subject: Any, check: Any) -> None:
    check(subject)


@pytest.mark.slow
@lmconform.parametrize_with_checks(VARIANTS, select=TRAINING)
def test_variants_train(subject: Any, check: Any) -> None:
    check(subject)


@lmconform.parametrize_with_checks([adaptive_from_gpt2], reference=gpt2, select=["parity"])
def test_is_at_parity_with_gpt2(subject: Any, check: Any) -> None:
    check(subject)
