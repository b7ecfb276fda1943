"""Forward and cached generation against transformers' model of the same shape, paired:

    python tests/benchmarks/positional_ratio.py [ROUNDS]

The encoding under test and transformers' own model take turns within one process, in CPU time of its one thread, which
other processes disturb least; the figure is the median over rounds of (ours / theirs). Below 1 is faster. `own` is our
decoder in that base's shape.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from fixtures.problems import math_tokenizer
from models.positional import METHODS, PositionalConfig, PositionalForCausalLM, graft

SHAPE: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
BATCH, TIME, NEW = 4, 128, 24


def base(name: str) -> Any:
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**SHAPE))
    if name == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, intermediate_size=1024))
    return LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=1024))


def own(name: str, method: str) -> Any:
    """The own decoder in the shape of a base."""
    like: dict[str, dict[str, Any]] = {
        "gpt2": {"tie_word_embeddings": True, "hidden_act": "gelu_new"},
        "gpt_neox": {"use_parallel_residual": True},
        "llama": {
            "norm": "rms", "gated": True, "hidden_act": "silu", "intermediate_size": 1024, "attention_bias": False,
            "feed_forward_bias": False,
        },
    }  # fmt: skip
    return PositionalForCausalLM(PositionalConfig(**SHAPE, **like[name], pe_method=method))


def forward(model: Any) -> Callable[[], Any]:
    ids = torch.randint(4, 1000, (BATCH, TIME))
    return lambda: model(ids, use_cache=False)


def generation(model: Any) -> Callable[[], Any]:
    ids = torch.randint(4, 1000, (BATCH, 32))
    mask = torch.ones_like(ids)
    model.generation_config.eos_token_id = None
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=mask, **how)


def seconds(run: Callable[[], Any]) -> float:
    started = time.thread_time()
    run()
    return time.thread_time() - started


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> float:
    ours(), theirs()
    found = []
    for index in range(rounds):
        pair = (ours, theirs) if index % 2 else (theirs, ours)
        spent = {id(run): seconds(run) for run in pair}
        found.append(spent[id(ours)] / spent[id(theirs)])
    return statistics.median(found)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    print("| model | against | " + " | ".join(METHODS) + " |")
    print("| --- | --- |" + " --- |" * len(METHODS))
    for name in ("gpt2", "gpt_neox", "llama"):
        theirs = base(name).eval()
        for kind in ("graft", "own"):
            cells = []
            for method in METHODS:
                if kind == "graft":
                    ours = graft(theirs, method, tokenizer=math_tokenizer())
                else:
                    ours = own(name, method)
                    ours.read_tokenizer(math_tokenizer())
                ours = ours.eval()
                pair = [ratio(what(ours), what(theirs), rounds) for what in (forward, generation)]
                cells.append(f"{pair[0]:.2f} / {pair[1]:.2f}")
            print(f"| {kind} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
