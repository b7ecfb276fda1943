"""Forward, cached generation and pruning, timed: `pytest tests/benchmarks/test_adaptive.py --benchmark-only`.

Ratios are paired: both sides in turn within one run, the median of the rounds' ratios, in processor time, so that what
else the machine does stays out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fixtures.subjects.adaptive import gpt2
from lmconform.bench import compare
from lmconform.bench.clocks import PROCESSOR
from lmconform.bench.pairing import ROUNDS
from models.adaptive import AdaptiveForCausalLM

pytestmark = pytest.mark.adaptive

HALF = {layer: [0, 2, 5, 7, 9, 11] for layer in range(4)}


def attention_bound() -> GPT2LMHeadModel:
    """Heads of GPT-2 small's width, four layers, a narrow feed-forward: what pruning can save is most of the work."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_embd=768, n_head=12, n_layer=4, n_inner=768, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config).eval()


def small() -> GPT2LMHeadModel:
    """Four layers of GPT-2 small, feed-forward and all."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_layer=4, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).eval()


def forward(model: Any, batch: int = 4, tokens: int = 64) -> Callable[[], Any]:
    ids = torch.randint(model.config.vocab_size, (batch, tokens))

    def run() -> Any:
        with torch.inference_mode():
            return model(ids, use_cache=False)

    return run


def generation(model: Any, batch: int = 2, prompt: int = 8, new: int = 8) -> Callable[[], Any]:
    ids = torch.randint(4, model.config.vocab_size, (batch, prompt))
    mask = torch.ones_like(ids)

    def run() -> Any:
        return model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    return run


def speed_up(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Processor time of `theirs` / time of `ours`, in turns: above 1 means that ours is faster."""
    return compare(theirs, ours, rounds=rounds, clock=PROCESSOR).ratio


@pytest.fixture(params=["gpt2", "gated", "half_pruned"])
def model(request: pytest.FixtureRequest) -> Any:
    """Tiny: GPT-2 itself, the same with gates, and that without half of its heads."""
    base = gpt2()
    base.generation_config.eos_token_id = None
    if request.param == "gpt2":
        return base
    made = AdaptiveForCausalLM.from_gpt2(base)
    if request.param == "half_pruned":
        made.prune_heads({layer: [0, 2] for layer in range(4)})
    return made


def test_forward(benchmark: Any, model: Any) -> None:
    benchmark(forward(model))


def test_cached_generation(benchmark: Any, model: Any) -> None:
    benchmark(generation(model))


@pytest.mark.parametrize("what", ["forward", pytest.param("generation", marks=pytest.mark.slow)])
def test_pruning_half_the_heads_pays(benchmark: Any, what: str) -> None:
    """The gated model, half of its gates shut, against the same with those heads removed."""
    gated, pruned = (AdaptiveForCausalLM.from_gpt2(attention_bound()) for _ in range(2))
    for layer, heads in HALF.items():
        gated.gates.data[layer, heads] = 0
    pruned.prune_heads(HALF)
    make = forward if what == "forward" else generation
    ratio = benchmark.pedantic(speed_up, args=(make(pruned), make(gated)), kwargs={"rounds": 6}, rounds=1)
    benchmark.extra_info["speed_up"] = ratio
    assert ratio > 1.1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["forward", "generation"])
@pytest.mark.parametrize("build", [gpt2, attention_bound, small], ids=["tiny", "attention", "gpt2_layers"])
def test_ratios_to_gpt2(benchmark: Any, build: Callable[[], GPT2LMHeadModel], what: str) -> None:
    """With gates against GPT-2, and half the heads against all with gates: the gates must not cost a tenth."""
    base = build()
    base.generation_config.eos_token_id = None
    gated, pruned = (AdaptiveForCausalLM.from_gpt2(base) for _ in range(2))
    heads = base.config.n_head
    pruned.prune_heads({layer: range(0, heads, 2) for layer in range(base.config.n_layer)})
    make = forward if what == "forward" else generation

    def measure() -> dict[str, float]:
        return {"gated": speed_up(make(gated), make(base)), "half_pruned": speed_up(make(pruned), make(gated))}

    ratios = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(ratios)
    print(f"{build.__name__} {what}: " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items()))
    assert ratios["gated"] > 0.9
