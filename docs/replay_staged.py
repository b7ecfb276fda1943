"""Writes docs/staged.md: stages 0 to 3 at equal budgets on WikiText-2, the way from stage to stage, and K-1 off and on.

LMCONFORM_DATA=... python docs/replay_staged.py              # goes on where it stopped; then writes the page
python docs/replay_staged.py --page                          # the page alone, from docs/replays/staged.json
LMCONFORM_DATA=... python docs/replay_staged.py --report-size --device cuda     # the report's size, 5,000 steps

A run is one arm and one seed. Every run is written to the JSON file when it is done, and is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments, set_seed  # noqa: E402
from transformers.trainer_callback import PrinterCallback  # noqa: E402

from models.positional import PositionalConfig, PositionalForCausalLM  # noqa: E402
from models.staged import StagedConfig, StagedForCausalLM  # noqa: E402
from models.staged.credit import HierarchicalCredit  # noqa: E402
from models.staged.stages import GraphClosing, at_stage, jump  # noqa: E402
from models.training.data import PadRight, encode, load_examples  # noqa: E402
from models.training.experiment import versions  # noqa: E402
from models.training.tokenizing import byte_pairs, with_padding  # noqa: E402

FOLDER = HERE / "replays"
REPORT = {100: 3000, 500: 148, 1000: 55, 5000: 20}  # what the report expected of its stage 0, and never measured


@dataclass(frozen=True)
class Setup:
    """One scale of the experiment."""

    sizes: dict[str, Any]
    vocabulary: int | None  # None: GPT-2's own
    rows: int | None
    time: int
    batch: int
    steps: int
    marks: tuple[int, ...]
    rate: float
    warmup: int
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    judged: int = 96  # blocks of text that losses are measured on, of training and of validation each
    accumulation: int = 1


ARMS = {
    "plain": "a plain decoder, as many parameters as stage 1",
    "stage 0": "MU (a plain embedding), projector, operators",
    "stage 1": "with TEMPORAL",
    "stage 2": "with K-1",
    "stage 2, K-1 by step": "with K-1, credit by each step alone",
    "stage 3": "with graph routing, closed over the first half",
    "chain": "stages 0, 1, 2 and 3 in turn, a quarter of the steps each",
    "stage 3, full MU": "all parts",
}
CPU = Setup(
    sizes={
        "embed_dim": 64, "time_dim": 16, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    vocabulary=2048, rows=4000, time=64, batch=12, steps=400, marks=(40, 100, 200, 300, 400), rate=4e-3, warmup=20,
    seeds=tuple(range(8)), arms=tuple(ARMS),
)  # fmt: skip
REPORT_SIZE = Setup(
    sizes={}, vocabulary=None, rows=None, time=512, batch=16, steps=5000, marks=tuple(REPORT), rate=6e-4, warmup=200,
    seeds=(0,), arms=("stage 0", "chain"),
)  # fmt: skip


# -- data --------------------------------------------------------------------------------------------------------------


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's byte pairs from LMCONFORM_DATA/gpt2-bpe, with a padding token of its own."""
    from tokenizers import ByteLevelBPETokenizer

    place = Path(os.environ["LMCONFORM_DATA"]) / "gpt2-bpe"
    made = ByteLevelBPETokenizer(str(place / "encoder.json"), str(place / "vocab.bpe"))
    end = "<|endoftext|>"
    with_ends = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, bos_token=end, eos_token=end, unk_token=end)
    return with_padding(with_ends)


@cache
def data(vocabulary: int | None, rows: int | None, time: int) -> tuple[Any, list[Any], list[Any]]:
    """Tokenizer, training and validation blocks of `time` tokens, WikiText-2's own splits."""
    train = load_examples("wikitext-2", "train", limit=rows)
    test = load_examples("wikitext-2", "test", limit=rows and rows // 10)
    tokenizer = gpt2_tokenizer() if vocabulary is None else byte_pairs([row.completion for row in train], vocabulary)
    blocks = [[block for block in encode(some, tokenizer, time)[0] if len(block["input_ids"]) == time]
              for some in (train, test)]  # fmt: skip
    return tokenizer, *blocks


# -- models ------------------------------------------------------------------------------------------------------------


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def first_stage(setup: Setup, tokenizer: Any, seed: int, *, full: bool) -> StagedForCausalLM:
    set_seed(seed)
    specials = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    changes = {**setup.sizes, "vocab_size": len(tokenizer), "use_full_model": full, **specials}
    return StagedForCausalLM(StagedConfig.sized("report", 0, **changes))


def plain(setup: Setup, tokenizer: Any, seed: int) -> PositionalForCausalLM:
    """RoPE, pre-norm, GELU, as many layers and heads; width and inner width such that the parameters are as many."""
    wanted = size(at_stage(first_stage(setup, tokenizer, seed, full=False), 1))
    model = first_stage(setup, tokenizer, seed, full=False).config
    heads, layers, words = model.num_attention_heads, model.num_hidden_layers, len(tokenizer)
    width = model.hidden_size
    while 2 * words * width + 12 * layers * width**2 > wanted:
        width -= 2 * heads

    def build(inner: int) -> PositionalForCausalLM:
        set_seed(seed)
        config = PositionalConfig(
            vocab_size=words, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=inner, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id, max_position_embeddings=model.max_position_embeddings,
        )  # fmt: skip
        return PositionalForCausalLM(config)

    return build(1 + round((wanted - size(build(1))) / (layers * (2 * width + 1))))


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass
class Marks(TrainerCallback):
    """Loss on training and on validation blocks, both in evaluation mode, at the wanted steps of the whole run."""

    setup: Setup
    offset: int
    sets: tuple[Sequence[Any], Sequence[Any]]
    collate: Any
    found: list[tuple[int, float, float]] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + self.offset
        if step in self.setup.marks:
            losses = [self.loss(kwargs["model"], some) for some in self.sets]
            self.found.append((step, losses[0], losses[1]))
            print(f"  step {step}: perplexity {math.exp(losses[0]):.1f}, validation {math.exp(losses[1]):.1f}")

    @torch.no_grad()
    def loss(self, model: Any, blocks: Sequence[Any]) -> float:
        training = model.training
        model.eval()
        each = self.setup.batch * 2
        total = 0.0
        for start in range(0, len(blocks), each):
            some = {name: value.to(model.device) for name, value in self.collate(blocks[start : start + each]).items()}
            total += float(model(**some, use_cache=False).loss) * len(some["input_ids"])
        model.train(training)
        return total / len(blocks)


def train(
    setup: Setup,
    model: Any,
    seed: int,
    device: str,
    *,
    first: int = 0,
    steps: int | None = None,
    stage: int = 0,
    memory: float = 0.99,
) -> list[tuple[int, float, float]]:
    """Steps `first` to `first + steps` of the whole run, on its data and at its rates, whatever the arm."""
    tokenizer, train_blocks, test_blocks = data(setup.vocabulary, setup.rows, setup.time)
    steps = setup.steps if steps is None else steps
    collate = PadRight(tokenizer.pad_token_id)
    order = torch.randperm(len(train_blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    each = setup.batch * setup.accumulation
    chosen = [train_blocks[order[place % len(order)]] for place in range(first * each, (first + steps) * each)]
    judged = [order[place] for place in range(min(setup.judged, len(order)))]  # of the training text, seen early
    marks = Marks(setup, first, ([train_blocks[i] for i in judged], test_blocks[: setup.judged]), collate)
    callbacks: list[Any] = [marks]
    if stage >= 2:
        callbacks.insert(0, HierarchicalCredit(max_norm=1.0, memory=memory))
    if stage >= 3:
        callbacks.insert(0, GraphClosing(max(1, steps // 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.rate, weight_decay=0.01)

    def factor(step: int) -> float:
        step += first
        return min((step + 1) / setup.warmup, (setup.steps - step) / (setup.steps - setup.warmup))

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model.train(),
            args=TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=setup.batch,
                gradient_accumulation_steps=setup.accumulation, max_grad_norm=0.0 if stage >= 2 else 1.0,
                bf16=device == "cuda", use_cpu=device == "cpu", report_to=[], save_strategy="no", disable_tqdm=True,
                logging_strategy="no", train_sampling_strategy="sequential", seed=seed, remove_unused_columns=False,
            ),
            train_dataset=chosen,
            data_collator=collate,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)),
            callbacks=callbacks,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return marks.found


def run(setup: Setup, arm: str, seed: int, device: str) -> dict[str, Any]:
    tokenizer, _, test_blocks = data(setup.vocabulary, setup.rows, setup.time)
    started = time.process_time()
    jumps: list[float] = []
    if arm == "plain":
        model: Any = plain(setup, tokenizer, seed)
        found = train(setup, model, seed, device)
    else:
        model = first_stage(setup, tokenizer, seed, full="full" in arm)
        if arm == "chain":
            found, quarter = [], setup.steps // 4
            for stage in range(4):
                if stage:
                    later = at_stage(model, stage)
                    ids = torch.tensor([block["input_ids"] for block in test_blocks[:8]])
                    jumps.append(jump(model, later, ids.to(model.device)))
                    model = later
                found += train(setup, model, seed, device, first=stage * quarter, steps=quarter, stage=stage)
        else:
            stage = int(arm.removeprefix("stage ")[0])
            model = at_stage(model, stage)
            memory = 0.0 if "by step" in arm else 0.99
            found = train(setup, model, seed, device, stage=stage, memory=memory)
    return {
        "marks": found, "parameters": size(model), "jumps": jumps,
        "seconds": round(time.process_time() - started, 1),
    }  # fmt: skip


def replay(setup: Setup, file: Path, device: str, limit: float) -> bool:
    """Make the runs that are missing, for at most `limit` seconds; whether all are there."""
    told = json.loads(json.dumps(asdict(setup)))
    done: dict[str, Any] = {"setup": told, "versions": versions(), "device": device, "runs": {}}
    if file.exists():
        done = json.loads(file.read_text(encoding="utf-8"))
        if done["setup"] != told:
            sys.exit(f"{file} holds runs of another setup: move it away first")
    started = time.monotonic()
    for seed in setup.seeds:
        for arm in setup.arms:
            key = f"{arm}, seed {seed}"
            if key in done["runs"]:
                continue
            if time.monotonic() - started > limit:
                return False
            print(key, flush=True)
            done["runs"][key] = run(setup, arm, seed, device)
            file.parent.mkdir(exist_ok=True)
            beside = file.with_suffix(".part")
            beside.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
            beside.replace(file)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--page", action="store_true", help="write the page from the runs that are there")
    parser.add_argument("--report-size", action="store_true", help="512 / 128 / 1024, 6 layers, GPT-2's byte pairs")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no run after so many seconds")
    options = parser.parse_args()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    setup, name = (REPORT_SIZE, "staged_report_size") if options.report_size else (CPU, "staged")
    whole = options.page or replay(setup, FOLDER / f"{name}.json", options.device, options.limit)
    if whole:
        from replay_staged_page import write

        write(FOLDER, HERE / "staged.md")


if __name__ == "__main__":
    main()
