"""Forward and cached generation of every stage, timed: `pytest tests/benchmarks/test_staged.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.staged.system import tiny

VARIANTS = {
    "stage_0": lambda: tiny(0, full=False),
    "stage_0_full": lambda: tiny(0),
    "stage_1": lambda: tiny(1, full=False),
    "stage_3_dense": lambda: tiny(3, full=False, openness=1.0),
    "stage_3": lambda: tiny(3, full=False),
    "stage_3_full": lambda: tiny(3),
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = VARIANTS[request.param]()
    made.generation_config.eos_token_id = None
    return made


def test_forward(benchmark: Any, model: Any) -> None:
    ids = torch.randint(model.config.vocab_size, (4, 64))
    with torch.inference_mode():
        benchmark(model, ids, use_cache=False)


def test_cached_generation(benchmark: Any, model: Any) -> None:
    ids = torch.randint(4, model.config.vocab_size, (2, 8))
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    generate: Callable[..., Any] = model.generate
    benchmark(generate, ids, **settings)


def test_training_step(benchmark: Any, model: Any) -> None:
    """Forward and backward."""
    ids = torch.randint(model.config.vocab_size, (4, 64))
    model.train()

    def step() -> None:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    benchmark(step)
