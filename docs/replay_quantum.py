"""Replays report 004 on real text and writes docs/quantum.md: LMCONFORM_DATA=... python docs/replay_quantum.py.

Every run (one condition, one seed) is a piece of docs/replays/quantum.json, kept as soon as it is made; what is there
is not run again. `--seconds S` stops taking up new pieces after S seconds, `--page` only writes the page and the plot.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from fixtures.reports.quantum import Faults, balanced_loss, cross_entropy, labelled, reported  # noqa: E402
from lmconform.monitors import CollapseMonitor, generated  # noqa: E402
from lmconform.monitors.samples import sample_figures  # noqa: E402
from models.quantum import QuantumConfig  # noqa: E402
from models.training.balance import BalancedLoss  # noqa: E402
from models.training.stories import mended  # noqa: E402
from models.training.words import word_level  # noqa: E402

FIGURES = HERE / "replays" / "quantum.json"
PAD, BOS, EOS = 0, 2, 3
VOCABULARY, LENGTH, BATCH, STEPS, RATE = 2048, 64, 16, 300, 5e-3
LOOKS = (0, 10, 25, 50, 100, 200, 300)
HELD_OUT_LINES, HELD_OUT, SAMPLES, SEEDS = 1000, 64, 64, (0, 1, 2)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 2 * LENGTH}
REPORTED = {"rate": 1e-5, "steps": 75, "batch": 4, "lines": 100}  # three epochs
POLLUTED = ("rolled_labels", "padding_is_eos", "empty_lines")
MODEL = ("amplitude_cancels", "states_non_negative", "no_mask", "no_positions")

SETTING = (
    f"lines of at most {LENGTH} tokens from the TinyStories sample, {VOCABULARY} words; {SIZES['hidden_size'] // 2} "
    f"complex dimensions, {SIZES['num_hidden_layers']} layers; AdamW, rate {RATE:g} falling to 0, {STEPS} steps of "
    f"{BATCH} lines"
)

Loss = Callable[[Tensor, Tensor], Tensor]  # logits and labels [batch, time], labels already shifted


def unshifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For what shifts by itself: one place more, label t at place t + 1. No label is lost, the last one neither."""
    return torch.nn.functional.pad(logits, (0, 0, 0, 1)), torch.nn.functional.pad(labels, (1, 0), value=-100)


def shifting(loss: BalancedLoss) -> Loss:
    return lambda logits, labels: loss.of(*unshifted(logits, labels))


def eos_penalty(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy and twice the mean probability of EOS."""
    return cross_entropy(logits, labels) + 2.0 * logits.softmax(-1)[..., EOS].mean()


@dataclass(frozen=True)
class Condition:
    says: str
    loss: Loss
    faults: tuple[str, ...] = ()
    rate: float = RATE
    steps: int = STEPS
    batch: int = BATCH
    lines: int | None = None  # the first so many of the training lines, all where None
    before: int = 0  # steps on polluted labels, by cross-entropy, that come first


OURS, A_LITTLE = (shifting(BalancedLoss(balance=weight)) for weight in (1.0, 0.1))
WEIGHED = shifting(BalancedLoss(eos_weight=0.1, eos_token_id=EOS))
CONDITIONS = {
    "sound": Condition("labels as they should be, cross-entropy", cross_entropy),
    "sound, report's loss": Condition("the same with ce + 1 - clamp(entropy, 0, 0.5)", balanced_loss),
    "sound, our balance": Condition("the same with the divergence from the labels' shares, weight 1", OURS),
    "polluted": Condition("blank lines, rolled labels, padding labelled EOS", cross_entropy, POLLUTED),
    "polluted, report's loss": Condition("the same with ce + 1 - clamp(entropy, 0, 0.5)", balanced_loss, POLLUTED),
    "polluted, EOS penalty": Condition("the same with 2.0 times EOS's mean probability added", eos_penalty, POLLUTED),
    "polluted, EOS weight": Condition("the same with EOS counting a tenth", WEIGHED, POLLUTED),
    "polluted, our balance": Condition("the same with the divergence from the labels' shares", OURS, POLLUTED),
    "report's rate": Condition(
        "labels as they should be; rate 1e-5, 100 lines, 3 epochs", cross_entropy, **REPORTED
    ),
    "report's model and rate": Condition(
        "the same with non-negative states, phases alone, no mask, no positions, and the report's loss", balanced_loss,
        MODEL, **REPORTED,
    ),
    "after a collapse": Condition(
        "100 steps on polluted labels, then 100 on labels as they should be; cross-entropy", cross_entropy, steps=100,
        before=100,
    ),
    "after a collapse, our balance": Condition(
        "the same, the second hundred with the divergence, weight 1", OURS, steps=100, before=100
    ),
    "sound, a little of our balance": Condition("as the sound one, with the divergence, weight 0.1", A_LITTLE),
}  # fmt: skip


# -- text --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Lines as ids with BOS in front and EOS behind; `blank` lines are BOS and EOS alone. `train` and `held` out."""

    tokenizer: Any
    train: list[list[int]]
    held: list[list[int]]
    vocabulary: int


def read() -> Text:
    """The lines of TinyStories in the file's order, blank ones included; those beyond LENGTH tokens are left out.

    The last lines are held out before anything is counted: the vocabulary is that of the others.
    """
    folder = os.environ.get("LMCONFORM_DATA")
    if not folder:
        raise SystemExit("set LMCONFORM_DATA to a folder that holds tinystories/tiny_stories.txt")
    lines = mended((Path(folder) / "tinystories" / "tiny_stories.txt").read_text(encoding="utf-8")).split("\n")
    tokenizer = word_level([line for line in lines[:-HELD_OUT_LINES] if line.strip()], VOCABULARY)
    encoded = [[*tokenizer.encode(line), EOS] for line in lines]
    train, held = (
        [row for row in rows if len(row) <= LENGTH] for rows in (encoded[:-HELD_OUT_LINES], encoded[-HELD_OUT_LINES:])
    )
    random.Random(0).shuffle(held)  # neighbours tell of the same things in the same words
    return Text(tokenizer, train, held, len(tokenizer))


def batches(rows: Sequence[list[int]], size: int, seed: int) -> Iterator[list[list[int]]]:
    """Shuffled batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows) - size + 1, size):
            yield [rows[i] for i in order[start : start + size]]


def chosen(rows: Sequence[list[int]], faults: Faults) -> list[list[int]]:
    return [row for row in rows if len(row) > 2 or faults.empty_lines]


# -- one run -----------------------------------------------------------------------------------------------------------


def run(condition: Condition, seed: int, text: Text) -> dict[str, Any]:
    faults = Faults.only(*condition.faults)
    torch.manual_seed(seed)
    model = reported(faults)(QuantumConfig(vocab_size=text.vocabulary, **SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=condition.rate, weight_decay=0.0)
    watching = CollapseMonitor(eos_token_id=EOS)
    if condition.before:
        polluted = Faults.only(*POLLUTED)
        wrong = batches(chosen(text.train, polluted), condition.batch, seed)
        for _ in range(condition.before):
            batch = labelled(next(wrong), polluted, LENGTH)
            step_once(model, optimizer, batch, cross_entropy)
    drawn = batches(chosen(text.train, faults)[: condition.lines], condition.batch, seed)
    held = labelled(chosen(text.held, faults)[:HELD_OUT], faults, LENGTH)
    started = time.process_time()
    looks = []
    for step in range(condition.steps + 1):
        if step in LOOKS or step == condition.steps:
            looks.append({"step": step, **predicted(model, held)})
        if step == condition.steps:
            break
        batch = labelled(next(drawn), faults, LENGTH)
        for group in optimizer.param_groups:
            group["lr"] = condition.rate * (1 - step / condition.steps)
        logits, value = step_once(model, optimizer, batch, condition.loss)
        logits, labels = unshifted(logits, batch["labels"])
        watching.step(
            logits=logits, loss=value, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            labels=labels,
        )  # fmt: skip
    seconds = time.process_time() - started
    return {
        "looks": looks, "seconds": seconds, "samples": written(model, text, seed), "first": first_tokens(model, text),
        "alerts": [[alert.step, alert.cause] for alert in watching.alerts],
    }  # fmt: skip


def step_once(model: Any, optimizer: Any, batch: dict[str, Tensor], loss: Loss) -> tuple[Tensor, Tensor]:
    """One optimizer step, gradients clipped at 1; the logits and the loss."""
    logits = model.train()(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    value = loss(logits, batch["labels"])
    optimizer.zero_grad()
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return logits.detach(), value.detach()


@torch.no_grad()
def predicted(model: Any, held: dict[str, Tensor]) -> dict[str, Any]:
    """Of the predictions at all places whose label counts, on held-out lines labelled as in training."""
    logits = model.eval()(input_ids=held["input_ids"], attention_mask=held["attention_mask"], use_cache=False).logits
    live = held["labels"] != -100
    chances, labels = logits[live].softmax(-1), held["labels"][live]
    winners = Counter(chances.argmax(-1).tolist())
    (top, count), total = winners.most_common(1)[0], winners.total()
    asked = Counter(labels.tolist())
    return {
        "loss": float(torch.nn.functional.cross_entropy(logits[live], labels)),
        "eos_mean": float(chances[:, EOS].mean()), "eos_likeliest": winners[EOS] / total,
        "top": top, "top_share": count / total, "coverage": len(winners) / logits.shape[-1],
        "asked_eos": asked[EOS] / total, "asked_top": asked.most_common(1)[0][1] / total,
        "asked_coverage": len(asked) / logits.shape[-1],
    }  # fmt: skip


@torch.no_grad()
def written(model: Any, text: Text, seed: int) -> dict[str, Any]:
    """Samples at temperature 1 from BOS, beside as many held-out lines cut to as many tokens."""
    torch.manual_seed(seed)
    sample = generated([[BOS]] * SAMPLES, max_new_tokens=LENGTH, pad_token_id=PAD, eos_token_id=EOS)
    rows = [list(row) for row in sample(model.eval())]
    tokens = [token for row in rows for token in row]
    lines = [row[1:-1] for row in text.held if len(row) > 2]
    flat = [token for line in lines for token in line]
    ended = sum(len(row) < LENGTH for row in rows)
    same = flat[: len(tokens)]
    return {
        **sample_figures(rows), "tokens": len(tokens), "eos": ended / max(1, len(tokens) + ended),
        "corpus_eos": len(lines) / (len(flat) + len(lines)), "words": len(set(tokens)), "corpus_words": len(set(same)),
        "corpus": sample_figures(lines[:SAMPLES]),
        "texts": [text.tokenizer.decode(row, skip_special_tokens=True) for row in rows[:3]],
    }  # fmt: skip


@torch.no_grad()
def first_tokens(model: Any, text: Text) -> dict[str, float]:
    """The probability of EOS behind the report's prompt, encoded without and with EOS at its end."""
    prompt = text.tokenizer.encode("once upon a time in")
    found = {}
    for name, ids in (("plain", prompt), ("ended", [*prompt, EOS])):
        found[name] = float(model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1)[EOS])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Replays report 004 and writes docs/quantum.md.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="take up no new piece after these")
    parser.add_argument("--page", action="store_true", help="run nothing: write the page and the plot")
    parser.add_argument("--only", metavar="CONDITION", help="runs of this condition alone")
    options = parser.parse_args()
    figures: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if not options.page:
        torch.set_num_threads(1)
        text, started = read(), time.monotonic()
        for seed in SEEDS:
            for name, condition in CONDITIONS.items():
                key = f"{name}/{seed}"
                if key in figures or (options.only and name != options.only):
                    continue
                if time.monotonic() - started > options.seconds:
                    raise SystemExit(f"{len(figures)} of {len(CONDITIONS) * len(SEEDS)} pieces are there; run it again")
                figures[key] = run(condition, seed, text)
                print(key, f"{figures[key]['seconds']:.0f} s", file=sys.stderr, flush=True)
                FIGURES.parent.mkdir(exist_ok=True)
                FIGURES.write_text(json.dumps(figures, indent=1))
    from quantum_page import write

    write(figures, {name: condition.says for name, condition in CONDITIONS.items()}, SETTING, HERE)


if __name__ == "__main__":
    main()
