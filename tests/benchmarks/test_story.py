"""A training step and cached generation of the story model beside a GPT-2 of its width, depth and vocabulary.

    pytest tests/benchmarks/test_story.py --benchmark-only

The same on the stories themselves, with an interval: `python docs/replay_story.py speed`.
"""

from __future__ import annotations

from typing import Any

import pytest

from fixtures.subjects.story import PEERS
from fixtures.workloads import work
from lmconform.bench import compare
from lmconform.bench.clocks import PROCESSOR
from lmconform.bench.pairing import ROUNDS

pytestmark = pytest.mark.story


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("kind", ["training", "generation"])
def test_time(benchmark: Any, kind: str, peer: str) -> None:
    benchmark(work(kind, PEERS[peer]("tiny", 64)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["training", "generation"])
def test_ratio_at_the_reports_size(benchmark: Any, kind: str) -> None:
    """Not a tenth slower than transformers' model, beyond chance."""
    ours, theirs = (work(kind, PEERS[peer]("report", 2000)) for peer in ("story", "gpt2"))
    found = benchmark.pedantic(compare, args=(ours, theirs), kwargs={"rounds": ROUNDS, "clock": PROCESSOR}, rounds=1)
    benchmark.extra_info["ratio"] = found.ratio
    print(f"{kind}: {found}")
    assert not found.slower_than(1.1)
