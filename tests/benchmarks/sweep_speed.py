"""The vectorised sweep against one at a time: python tests/benchmarks/sweep_speed.py [ROUNDS]

12 rates x 3 seeds x 100 steps on one thread. One at a time is what a user writes: transformers' module as it comes,
torch.optim.AdamW as it comes; 25 of its steps before and 25 after each sweep stand for all. CPU time of the one thread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lmconform import Subject
from lmconform.specimen import Specimen
from lmconform.sweep.batches import Batches, next_token
from lmconform.sweep.corpus import rule_corpus, sentence
from lmconform.sweep.members import Member, Training, train
from lmconform.sweep.rates import spaced

MEMBERS = [Member(rate, seed) for rate in spaced(1e-5, 1e-1, 12) for seed in range(3)]
STEPS = 100


def llama(width: int) -> Callable[[], LlamaForCausalLM]:
    """Two layers, 4 heads of which 2 hold keys and values, 99 tokens."""
    return lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=99, hidden_size=width, intermediate_size=width * 7 // 4, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        )
    )  # fmt: skip


def alone(specimen: Specimen, batches: Batches, steps: int = 25) -> float:
    """Seconds for a step of one model."""
    model = specimen.fresh(0).module.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    started = time.thread_time()
    for step in range(steps):
        batch = batches(step, 0)
        optimizer.zero_grad()
        logits = model(input_ids=batch.ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        loss.item()
    return (time.thread_time() - started) / steps


def measure(specimen: Specimen, batches: Batches) -> tuple[float, float, float, Training]:
    """How many times faster; milliseconds of a step alone and of a member's step together; the training."""
    before = alone(specimen, batches)
    started = time.thread_time()
    made = train(specimen, MEMBERS, batches, STEPS, keep=False)
    each = (time.thread_time() - started) / sum(map(len, made.losses))
    one = (before + alone(specimen, batches)) / 2
    return one / each, 1000 * one, 1000 * each, made


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for width in (32, 64):
        specimen = Subject(llama(width), name=f"Llama of width {width}").open()
        known = next_token(sentence(specimen, 0))
        corpus = rule_corpus(specimen)
        size = sum(parameter.numel() for parameter in specimen.module.parameters())
        tasks: dict[str, Batches] = {
            "one sentence, 1 x 16": lambda step, seed, known=known: known,  # type: ignore[misc]
            "corpus, 2 x 16": corpus.batches(specimen, 2, 16),
            "corpus, 4 x 16": corpus.batches(specimen, 4, 16),
        }
        for name, batches in tasks.items():
            found = [measure(specimen, batches) for _ in range(rounds)]
            faster, one, each = ([figures[place] for figures in found] for place in range(3))
            made = found[-1][3]
            print(
                f"{specimen.name} ({size} parameters), {name}: {statistics.median(faster):.1f} times faster "
                f"[{min(faster):.1f}, {max(faster):.1f}]; a step alone {statistics.median(one):.2f} ms, "
                f"a member's {statistics.median(each):.2f} ms; all {len(MEMBERS)} in "
                f"{made.seconds:.1f} s, {made.chunk * made.member_bytes / 2**20:.0f} MiB ({made.mode})",
                flush=True,
            )


if __name__ == "__main__":
    main()
