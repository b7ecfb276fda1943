"""A training step and cached generation of the quantum model beside a GPT-NeoX of its width, depth and vocabulary.

    pytest tests/benchmarks/test_quantum.py --benchmark-only

GPT-NeoX turns whole heads, too, and has the same feed-forward: what differs is the embedding and, where it is on, the
interference layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from fixtures.workloads import work
from lmconform.bench import compare
from lmconform.bench.clocks import PROCESSOR
from lmconform.bench.pairing import ROUNDS
from models.quantum import QuantumConfig, QuantumForCausalLM
from models.quantum.system import SIZES

pytestmark = pytest.mark.quantum


def quantum(size: str, vocabulary: int, *, interference: bool = False) -> QuantumForCausalLM:
    torch.manual_seed(0)
    return QuantumForCausalLM(QuantumConfig(vocab_size=vocabulary, interference=interference, **SIZES[size]))


def gpt_neox(size: str, vocabulary: int) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    shape = SIZES[size]
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocabulary, intermediate_size=4 * shape["hidden_size"], use_parallel_residual=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
            bos_token_id=2, eos_token_id=3, pad_token_id=0, **shape,
        )
    )  # fmt: skip


PEERS: dict[str, Callable[[str, int], Any]] = {
    "quantum": quantum,
    "quantum_interference": lambda size, vocabulary: quantum(size, vocabulary, interference=True),
    "gpt_neox": gpt_neox,
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("kind", ["training", "generation"])
def test_time(benchmark: Any, kind: str, peer: str) -> None:
    benchmark(work(kind, PEERS[peer]("tiny", 64)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["training", "generation"])
def test_ratio_at_the_reports_size(benchmark: Any, kind: str) -> None:
    """Complex states cost no tenth of the time beside GPT-NeoX, beyond chance."""
    ours, theirs = (work(kind, PEERS[peer]("report", 2048)) for peer in ("quantum", "gpt_neox"))
    found = benchmark.pedantic(compare, args=(ours, theirs), kwargs={"rounds": ROUNDS, "clock": PROCESSOR}, rounds=1)
    benchmark.extra_info["ratio"] = found.ratio
    print(f"{kind}: {found}")
    assert not found.slower_than(1.1)
