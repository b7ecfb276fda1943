"""A training step and cached generation of the story model beside a GPT-2 of its width, depth and vocabulary.

    pytest tests/benchmarks/test_story.py --benchmark-only

The same on the stories themselves, with an interval: `python docs/replay_story.py speed`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fixtures.subjects.story import PEERS, training_step
from lmconform.bench import compare
from lmconform.bench.clocks import PROCESSOR
from lmconform.bench.pairing import ROUNDS

pytestmark = pytest.mark.story

ROWS, TIME, NEW = 2, 32, 8


def blocks(vocabulary: int) -> list[list[int]]:
    return torch.randint(4, vocabulary, (16, TIME)).tolist()


def generation(model: Any) -> Callable[[], Any]:
    model.eval()
    ids = torch.randint(4, model.config.vocab_size, (ROWS, TIME))
    mask = torch.ones_like(ids)
    return lambda: model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("peer", PEERS)
def test_training_step(benchmark: Any, peer: str) -> None:
    benchmark(training_step(PEERS[peer]("tiny", 64), blocks(64), ROWS))


@pytest.mark.parametrize("peer", PEERS)
def test_cached_generation(benchmark: Any, peer: str) -> None:
    benchmark(generation(PEERS[peer]("tiny", 64)))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["training", "generation"])
def test_ratio_to_gpt2_at_the_reports_size(benchmark: Any, what: str) -> None:
    """Not a tenth slower than transformers' model, beyond chance."""

    def task(peer: str) -> Callable[[], Any]:
        model = PEERS[peer]("report", 2000)
        return training_step(model, blocks(2000), ROWS) if what == "training" else generation(model)

    found = benchmark.pedantic(
        compare, args=(task("story"), task("gpt2")), kwargs={"rounds": ROUNDS, "clock": PROCESSOR}, rounds=1
    )
    benchmark.extra_info["ratio"] = found.ratio
    print(f"{what}: {found}")
    assert not found.slower_than(1.1)
