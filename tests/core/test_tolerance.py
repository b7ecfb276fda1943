"""The noise floor is measured, sees rounding and nothing else."""

from __future__ import annotations

import pytest
import torch

from fixtures.subjects import SOUND, build
from lmconform import Subject, tolerance


@pytest.mark.parametrize("name", SOUND)
def test_noise_floor_is_rounding_sized(name: str) -> None:
    specimen = Subject(lambda: build(name)).open()
    scale = float(specimen.logits(specimen.probe_ids(2, 40)).abs().max())
    assert 1e-8 * scale < specimen.noise < 1e-4 * scale


def test_half_precision_has_a_wider_floor() -> None:
    single = Subject(lambda: build("plain")).open()
    half = Subject(lambda: build("plain")).open(dtype="bfloat16")
    assert half.noise > 1000 * single.noise


def test_float64_copy_is_sharper() -> None:
    specimen = Subject(lambda: build("gpt2")).open()
    twin = specimen.twin()
    assert twin is not None
    assert twin.logits(twin.probe_ids()).dtype == torch.float64
    assert twin.noise < 0.1 * specimen.noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bound_is_a_stated_factor_over_the_floor(dtype: torch.dtype) -> None:
    logits = torch.ones(1, 2, 3, dtype=dtype)
    assert tolerance.allowed(1e-3, logits) == pytest.approx(tolerance.FACTOR * 1e-3)
    assert tolerance.allowed(0.0, logits) == pytest.approx(tolerance.FACTOR * torch.finfo(dtype).eps)
