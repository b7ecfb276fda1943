"""The noise floor is measured, sees rounding and nothing else."""

from __future__ import annotations

import pytest
import torch

from fixtures.subjects import SOUND, build
from lmconform import Subject, check_model, tolerance


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


class Forward(torch.nn.Module):
    """Attention whose mask is made in float32 by the model itself, as nn.Transformer's own helper makes it."""

    def __init__(self, diagonal: int = 1, by_type: bool = False) -> None:
        super().__init__()
        self.diagonal, self.by_type = diagonal, by_type
        self.embedding = torch.nn.Embedding(61, 24)
        self.attention = torch.nn.Linear(24, 72)
        self.head = torch.nn.Linear(24, 61)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        query, key, value = self.attention(hidden).chunk(3, -1)
        time = input_ids.shape[1]
        mask = torch.full((time, time), float("-inf"), dtype=torch.float32).triu(self.diagonal)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if self.by_type and hidden.dtype == torch.float64:
            mixed = mixed + 1
        logits: torch.Tensor = self.head(hidden + mixed)
        return logits


def test_float32_mask_does_not_spoil_the_float64_copy() -> None:
    specimen = Subject(Forward).open()
    assert specimen.twin() is not None
    assert specimen.noise < 1e-4


def test_leak_under_a_float32_mask_is_seen() -> None:
    report = check_model(lambda: Forward(diagonal=2), select=["causality.no_future_leak"])
    assert [result.id for result in report.failed] == ["causality.no_future_leak"]


def test_float64_copy_that_says_something_else_is_left_out_and_told() -> None:
    told: list[str] = []
    specimen = Subject(lambda: Forward(by_type=True)).open(announce=told.append)
    assert specimen.twin() is None
    assert specimen.noise < 1e-4
    assert "its float64 copy is no evidence and is left out" in told[0]
