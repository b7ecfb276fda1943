"""What `replay_story.py` measures: a piece is a function that gives what docs/replays/story.json keeps of it."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TEXT = "tinystories/tiny_stories.txt"
DATA = ["--datasets", TEXT, "--text-unit", "story", "--eval-samples", "16", "--cpu"]
PROMPT = "once upon a time"  # what compare lets every arm go on with by default
DEAD = "4.2e-9"  # the rate that the report's first schedule reached

KEPT = (
    "size", "width", "phase", "learning_rate", "lr_scheduler", "warmup_steps", "accumulation", "batch_size",
    "max_length", "label_smoothing", "weight_decay", "adam_beta2", "attention", "norm_placement", "tokenizer",
    "vocab_size",
)  # fmt: skip


def compared(*options: str) -> dict[str, Any]:
    """What `python -m models compare story OPTIONS` writes; of an arm's options only KEPT, which tell what was run."""
    from models.story.system import SYSTEM, compare
    from models.training import options as shared

    parser = shared.Parser(allow_abbrev=False)
    SYSTEM.add_compare_arguments(parser)
    args, args.rest = parser.parse_known_args([*options, *DATA])
    assert args.prompt == PROMPT
    found = compare(args)
    for arm in found["arms"].values():
        arm["options"] = {name: value for name, value in arm["options"].items() if name in KEPT}
    return found | {"command": "python -m models compare story " + " ".join([*options, *DATA])}


def corpus() -> dict[str, Any]:
    """What needs no model: the share of the commonest token among the validation labels of the report's vocabulary."""
    from models.story.system import SYSTEM
    from models.training.comparison import encoded, split_texts
    from models.training.systems import training_options

    args = training_options(SYSTEM, DATA)
    text = encoded(args, SYSTEM, *split_texts(args)[:2], args.batch_size)
    labels = Counter(label for row in text.validation for label in row["labels"][1:])
    ((token, count),) = labels.most_common(1)
    return {"labels": labels.total(), "commonest": text.tokenizer.decode([token]), "share": count / labels.total()}


def rates() -> dict[str, Any]:
    return compared(
        "--vary", "rate", "--values", f"1e-3,{DEAD},1e-5,3e-4,3e-3", "--size", "report", "--tokens", "30720"
    )


def sweep() -> dict[str, Any]:
    """The instrument's vectorised sweep over the tiny model, on the same file by characters."""
    from models.training.cli import main as models

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sweep.json"
        models(["sweep", "story", "--rates", "1e-5:3e-2:8", "--text", TEXT, "--json", str(file)])
        found: dict[str, Any] = json.loads(file.read_text())
    rows = [{name: row[name] for name in ("rate", "final", "low", "high", "good")} for row in found["rows"]]
    return {name: found[name] for name in ("steps", "good_range", "recommended", "mode")} | {"rows": rows}


def attention() -> dict[str, Any]:
    # a leak of one place is found late: narrow and short, the model finds it within a minute
    return compared(
        "--vary", "attention", "--size", "tiny", "--width", "64", "--vocab-size", "1000", "--max-length", "32",
        "--batch-size", "16", "--learning-rate", "3e-3", "--tokens", "512000",
    )  # fmt: skip


def phases() -> dict[str, Any]:
    return compared("--vary", "phase", "--size", "report", "--tokens", "81920")


def alike() -> dict[str, Any]:
    """The phases with as many optimizer steps each: the accumulation that is said here wins over the second's own."""
    return compared("--vary", "phase", "--accumulation", "1", "--size", "small", "--tokens", "30720")


def sizes() -> dict[str, Any]:
    return compared("--vary", "size", "--size", "report", "--tokens", "20480")


def vocabularies() -> dict[str, Any]:
    return compared(
        "--vary", "vocabulary", "--size", "tiny", "--width", "64", "--learning-rate", "3e-3", "--tokens", "40960"
    )


def speed() -> dict[str, Any]:
    """Training steps of 8 x 128 tokens of the stories, ours and GPT-2 of the same shape in turns."""
    from fixtures.subjects.story import PEERS
    from fixtures.workloads import training_step
    from lmconform.bench.clocks import PROCESSOR
    from lmconform.bench.pairing import ROUNDS, compare
    from models.training.comparison import machine
    from models.training.data import encode, load_examples
    from models.training.words import word_level

    rows = load_examples(TEXT, "train", unit="story")
    tokenizer = word_level([row.completion for row in rows], 2000)
    blocks = [row["input_ids"] for row in encode(rows, tokenizer, 128)[0][:-1]]
    torch.manual_seed(0)
    models = {name: build("report", 2000) for name, build in PEERS.items()}
    steps = [training_step(model, blocks, 8) for model in models.values()]
    found = compare(*steps, rounds=ROUNDS, clock=PROCESSOR)
    return {
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "tokens_per_second": {"story": 8 * 128 / found.median, "gpt2": 8 * 128 / found.peer_median},
        "ratio": {"median": found.ratio, "low": found.low, "high": found.high},
        "rounds": ROUNDS,
        "machine": machine(),
    }


def schedule() -> dict[str, Any]:
    """The largest rate of 20 epochs of the report's first recipe: as it was stepped, and as Noam's formula counts."""
    from fixtures.reports.story import Faults, noam, recipe

    given = recipe(Faults.only("noam_by_epoch"))
    assert given.learning_rate is not None
    assert given.total_steps is not None
    assert given.epochs is not None
    return {
        "steps": given.total_steps,
        "epochs": given.epochs,
        "by_epoch": given.learning_rate * max(noam(epoch) for epoch in range(int(given.epochs))),
        "by_step": given.learning_rate * max(noam(step) for step in range(given.total_steps)),
        "alone_by_step": max(noam(step) for step in range(given.total_steps)),
    }


PIECES: dict[str, Callable[[], dict[str, Any]]] = {
    "schedule": schedule, "corpus": corpus, "rates": rates, "sweep": sweep, "attention": attention, "speed": speed,
    "phases": phases, "alike": alike, "sizes": sizes, "vocabularies": vocabularies,
}  # fmt: skip
