"""Forward and cached generation of every encoding, beside transformers' model of the same shape.

    pytest tests/benchmarks/test_positional.py --benchmark-only -k alibi --benchmark-group-by group

Without --benchmark-only those of the own decoder run once, so that a broken benchmark is seen; the others are slow.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fixtures.subjects import positional

ASKED = "--benchmark-only" in sys.argv  # otherwise a benchmark runs once

COMBINATIONS = [
    pytest.param(
        base,
        variant,
        id=f"{base}_{variant or 'of_transformers'}",
        marks=[pytest.mark.slow] if base != "own" else [],
    )
    for base in positional.BASES
    for variant in (*positional.VARIANTS, *([None] if base != "own" else []))
]
NEW = 16


@functools.cache
def model(base: str, variant: str | None) -> PreTrainedModel:
    torch.manual_seed(0)
    made = positional.build(base, variant) if variant else positional.base_model(base)
    made.generation_config.eos_token_id = None
    return made.eval()


def ids(batch: int, time: int) -> Tensor:
    return torch.randint(4, 100, (batch, time), generator=torch.Generator().manual_seed(0))


def timed(benchmark: Any, run: Any) -> Any:
    """Many rounds where benchmarks are asked for, else one."""
    return benchmark(run) if ASKED else benchmark.pedantic(run, rounds=1, iterations=1)


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
@torch.no_grad()
def test_forward(benchmark: Any, base: str, variant: str | None) -> None:
    benchmark.group = f"forward, {base}"
    made, batch = model(base, variant), ids(4, 64)
    assert timed(benchmark, lambda: made(batch, use_cache=False).logits).shape == (4, 64, positional.VOCABULARY)


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
@torch.no_grad()
def test_generate(benchmark: Any, base: str, variant: str | None) -> None:
    benchmark.group = f"generate {NEW} tokens with a cache, {base}"
    made, batch = model(base, variant), ids(4, 16)
    mask = torch.ones_like(batch)
    run = functools.partial(
        made.generate, batch, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    assert timed(benchmark, run).shape == (4, 16 + NEW)
