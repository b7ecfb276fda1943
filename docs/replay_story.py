"""Replays report 001 on the story model and writes docs/story.md, docs/replays/story.json and the plots.

    LMCONFORM_DATA=... python docs/replay_story.py                 # what is not in the JSON yet, then the page
    LMCONFORM_DATA=... python docs/replay_story.py rates phases    # these pieces only, then the page
    python docs/replay_story.py --page                             # the page from the JSON

Every piece is written when it is done: a run that was cut goes on with the next one. Remove a piece from the JSON to
measure it again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

PAGE, FOLDER = ROOT / "docs" / "story.md", ROOT / "docs" / "replays"
FIGURES = FOLDER / "story.json"
TEXT = "tinystories/tiny_stories.txt"
DATA = ["--datasets", TEXT, "--text-unit", "story", "--eval-samples", "16", "--cpu"]
PROMPT = "once upon a time"  # what compare lets every arm go on with by default
DEAD = "4.2e-9"  # the rate that the report's first schedule reached

Arms = Mapping[str, Any]
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


# -- pieces ------------------------------------------------------------------------------------------------------------


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


# -- page --------------------------------------------------------------------------------------------------------------

HEAD = """\
# story: two training phases, compared fairly

*Generated by `python docs/replay_story.py`; every figure on it is of that run.*

    python -m models train story --datasets stories.txt --size report --max-steps 2000     # phase 1; --phase 2
    python -m models generate story --prompt "once upon a time" --temperature 0.8 --top-k 50 --top-p 0.95
    python -m models compare story --vary phase --seeds 3 --tokens 102400 --size small --datasets stories.txt
    python -m models sweep story --rates 1e-5:3e-2:8 --text stories.txt
    python -m models diagnose experiments/story/final --device sim
    pytest -k story

Token embeddings times sqrt(d) plus sinusoids, pre-norm blocks (`--norm-placement post` is the report's), a head of its
own. `--tokenizer word` (lower case, words and `. ! ? ' , ; : -`) or `character`; both are made from the training texts
with the tokenizers library and saved as ordinary fast tokenizers. Phase 1 is AdamW at 1e-3 with a linear warm-up
counted in optimizer steps; phase 2 adds label smoothing 0.1, accumulation 2, a cosine, betas (0.9, 0.98) and weight
decay 0.01. A phase is a set of defaults: what is said on the command line wins.

A text of a .txt file is a line. `--text-unit story` is for files in which a single line break parts stories and a blank
line the paragraphs of one, as in the sample below, or `<|endoftext|>` the stories. An ordinary file it cuts wrongly.

`compare` trains arms that differ in one thing (`--vary phase, rate, size, vocabulary, attention, norm`). Texts, split,
tokenizer and the number of tokens read are the same for all; within a seed all arms of one shape start from the same
weights (hashes are compared) and read the same batches in the same order. Validation loss and accuracy are plain
cross-entropy's, whatever was trained on; differences are paired by seed, with Student's interval over the seeds. It
refuses budgets that are no whole number of steps, one seed alone, rows with a prompt, and steps or epochs of an arm's
own. Training texts whose normal form is that of a held-out one are left out.

## What the report saw, and what it was

| the report | what it was | what shows it |
| --- | --- | --- |
| "0.002 % accuracy, 3e-4 is too small" | a Noam factor times 3e-4, stepped once per epoch | `training.schedule` |
| "99.9 % validation accuracy" | no causal mask: each position saw its answer | `causality.no_future_leak` |
| "phase 2 is 1.9 % worse" | vocabularies and validation texts of their own | `tokenizer.bounds`, `collapse.labels` |
| "time time time" | the leak: what copies the next word repeats the last one where there is no next | the same |
| sampling helped | it could: until then the likeliest word was always taken | `generation.controls` |

Each is planted back into this model in `fixtures/reports/story.py`, and named first: `pytest tests/reports -k story`.

The sound model is green in the default profile, training checks and both phases' recipes included: words and
characters, pre-norm and post-norm, on the CPU (4 to 8 s each) and on the simulated accelerator (9 to 23 s):
`pytest tests/story -m "slow or not slow"`.
"""


def page(figures: Mapping[str, Any]) -> str:
    """docs/story.md from the pieces. Raises KeyError for one that has not been measured."""
    parts = [HEAD, _setting(figures)]
    for name, section in SECTIONS.items():
        parts.append(section(figures[name]))
    return "\n".join(parts)


def _setting(figures: Mapping[str, Any]) -> str:
    found = figures["phases"]
    data, machine, used = found["data"], found["machine"], found["versions"]
    seconds = sum(piece["cpu_seconds"] for piece in figures.values())
    text = (
        f"Text: the sample of TinyStories (944 kB), {data['texts']} stories to train on and "
        f"{data['validation_texts']} held out by seed 0. In this file a single line break parts stories and a blank "
        f"line the paragraphs of one (`--text-unit story`); quotes that had been read as Windows-1252 are mended. "
        f"Stories are packed into blocks, BOS and EOS between them, of 128 tokens and 8 to a batch unless said. "
        f"Seeds {', '.join(map(str, found['seeds']))}. Everything runs on one thread of a shared machine of "
        f"{machine['cores']} cores ({machine['processor']}), torch "
        f"{used['torch']}, transformers {used['transformers']}: {seconds / 60:.0f} minutes of processor time in all. "
        f"Budgets are small, so that three seeds of every arm fit into them: the figures compare arms, they are not "
        f"what these models can reach. Means over seeds with their 95 % interval.\n\n"
        f"Of the {figures['corpus']['labels']} validation tokens of the vocabulary of 2000, "
        f"{figures['corpus']['share']:.1%} are {figures['corpus']['commonest']!r}: what a model has right that says "
        f"nothing else (`docs/replay_story.py corpus`)."
    )
    paragraphs = [textwrap.fill(paragraph, 120) for paragraph in text.split("\n\n")]
    return "\n\n".join(["## Measured", *paragraphs]) + "\n"


def _schedule(found: Arms) -> str:
    return f"""\
## The dead schedule

    python docs/replay_story.py schedule

3e-4 times Noam's factor (width 32, warm-up 4000), 20 epochs, {found["steps"]} steps:

| stepped | largest rate of the run |
| --- | --- |
| once per epoch, as reported | {found["by_epoch"]:.1e} |
| once per optimizer step, still as a factor of 3e-4 | {found["by_step"]:.1e} |
| once per optimizer step, as the rate that the formula is | {found["alone_by_step"]:.1e} |
"""


def _rates(found: Arms) -> str:
    said = {"1e-5": "0 %", "3e-4": "35 %", "1e-3": "100 %", "3e-3": '"also works well"', DEAD: '0.002 % (as "3e-4")'}
    rows = "\n".join(
        f"| {name} | {said[name]} | {_percent(arm['accuracy'])} | {_number(arm['loss'])} |"
        for name, arm in _ordered(found)
    )
    return f"""\
## Learning rates

{_what(found)}

| rate | the report, answers in view | accuracy | validation loss |
| --- | --- | --- | --- |
{rows}

![accuracy by learning rate](replays/story_rates.svg)

The report's percentages are of a model that could read the answers.
{_rate_verdict(found)}
"""


def _rate_verdict(found: Arms) -> str:
    best = min((arm["loss"]["mean"], name) for name, arm in found["arms"].items())[1]
    low = found["arms"]["3e-4"]["loss"]["mean"] - found["arms"][best]["loss"]["mean"]
    dead = found["arms"][DEAD]["accuracy"]["mean"]
    return (
        f"Here the best of these rates is {best}, and 3e-4 is {low:.2f} nats behind it after so few steps: slow, "
        f'not dead. At {DEAD}, which is what the report\'s "3e-4" was, accuracy is {dead:.2%}.'
    )


def _sweep(found: Arms) -> str:
    rows = "\n".join(
        f"| {row['rate']:.1e} | {row['final']:.2f} | {row['low']:.2f} to {row['high']:.2f} |" for row in found["rows"]
    )
    low, high = found["good_range"]
    return f"""\
## A wide sweep

    python -m models sweep story --rates 1e-5:3e-2:8 --text {TEXT}

The tiny model, {found["steps"]} steps of AdamW without schedule on 2 windows of 16 characters, {len(found["rows"])}
rates x 3 seeds at once ({found["mode"]}), {found["cpu_seconds"]:.0f} s.

| rate | loss at the end | over the seeds |
| --- | --- | --- |
{rows}

Good range {low:.1e} to {high:.1e}, recommended {found["recommended"]:.1e}: narrow models take higher rates.
"""


def _attention(found: Arms) -> str:
    rows = "\n".join(
        f"| {name} | {_percent(arm['accuracy'])} | {_in_view(arm):.1f} % | {_percent(arm['prefix_accuracy'])} "
        f"| {_number(arm['loss'])} |"
        for name, arm in found["arms"].items()
    )
    return f"""\
## Causal against bidirectional

{_what(found)}

| attention | accuracy | at 8 places of a row, the text in view | there, from the words before alone | validation loss |
| --- | --- | --- | --- | --- |
{rows}

![accuracy with the text in view and from the words before alone](replays/story_attention.svg)

A model that copies the word that follows is right wherever there is one, and has nothing to go by at the end of a text,
where generation begins: both headlines of the report, 99.9 % and "time time time", come of one fault. What the two
write behind "{PROMPT}" (seed 0; greedy, then temperature 0.8, top-k 50, nucleus 0.95):

{_written(found)}
"""


def _in_view(arm: Arms) -> float:
    """Accuracy with the whole row in view at the places of `prefix_accuracy`, in percent."""
    return 100.0 * float(arm["prefix_accuracy"]["mean"] + arm["leak"]["mean"])


def _phases(found: Arms) -> str:
    difference = found["differences"]["2"]
    worse = difference["loss"]["low"] > 0
    better = difference["loss"]["high"] < 0
    verdict = "phase 2 is worse" if worse else "phase 2 is better" if better else "chance explains the difference"
    return f"""\
## Phase 1 against phase 2

{_what(found)}
Phase 2 takes half as many optimizer steps, of twice the tokens.

{_arms(found, "phase")}

Phase 2 less phase 1, paired: loss {_signed(difference["loss"])}, accuracy {_signed(difference["accuracy"], 100)} %: at
this budget {verdict}. The report had 20.3 % and 18.4 % with vocabularies and splits of their own.

{_written(found)}
"""


def _alike(found: Arms) -> str:
    difference = found["differences"]["2"]["loss"]
    return f"""\
### With as many optimizer steps each

{_what(found)}

{_arms(found, "phase")}

Phase 2 less phase 1, paired: loss {_signed(difference)}. This is what smoothing, cosine, betas and decay do.
"""


def _sizes(found: Arms) -> str:
    return f"""\
## Sizes

{_what(found)}

{_arms(found, "width")}

Every width reads the same tokens at the same rate of 1e-3: what is compared is the start of training, and a larger
model that overfits would need epochs to show it. The report saw "large models repeat" on models that leaked.
"""


def _vocabularies(found: Arms) -> str:
    rows = "\n".join(
        f"| {name} | {arm['vocabulary']} | {arm['unknown_share']:.1%} | {arm['epochs']:.2f} | {_number(arm['loss'])} "
        f"| {_number(arm['nats_per_character'])} |"
        for name, arm in found["arms"].items()
    )
    return f"""\
## Vocabularies

{_what(found)}

Losses a token are of different tokens. What compares is nats a character of one and the same text (all
arms get the word tokenizer's normal form), an unknown word charged as one of all texts' unknown words by chance
(Ueberla 1994).

| tokenizer | tokens | unknown | epochs | loss a token | nats a character |
| --- | --- | --- | --- | --- | --- |
{rows}

The epochs show it: the same number of tokens, and the same cost, is that much less text in characters.

{_written(found)}
"""


def _speed(found: Arms) -> str:
    ratio, each = found["ratio"], found["tokens_per_second"]
    return f"""\
## Speed of training

    python docs/replay_story.py speed

A step of 8 x 128 tokens of the stories (forward, backward, clipping, AdamW), ours and transformers' GPT-2 of the same
width, depth, heads, inner width and vocabulary in turns in one process, {found["rounds"]} rounds, processor time of one
thread. GPT-2 differs in its learned positions, the tanh form of GELU (several operations in transformers) and one
matrix for q, k and v.

| model | parameters | tokens a second |
| --- | --- | --- |
| story, report's size | {found["parameters"]["story"]:,} | {each["story"]:.0f} |
| GPT-2 of its shape | {found["parameters"]["gpt2"]:,} | {each["gpt2"]:.0f} |

Time of ours over time of theirs: {ratio["median"]:.2f} [{ratio["low"]:.2f}, {ratio["high"]:.2f}] (below 1 is faster).
"""


SECTIONS: dict[str, Callable[[Arms], str]] = {
    "schedule": _schedule, "rates": _rates, "sweep": _sweep, "attention": _attention, "speed": _speed,
    "phases": _phases, "alike": _alike, "sizes": _sizes, "vocabularies": _vocabularies,
}  # fmt: skip


def _what(found: Arms) -> str:
    arm = next(iter(found["arms"].values()))
    options = arm["options"]
    return (
        f"    {found['command']}\n\n{found['tokens']:,} tokens an arm ({arm['epochs']:.2f} epochs of the base), size "
        f"{options['size']}, {len(found['seeds'])} seeds; {found['cpu_seconds']:.0f} s of processor time."
    )


def _arms(found: Arms, what: str) -> str:
    head = f"| {what} | parameters | optimizer steps | accuracy | validation loss |\n| --- | --- | --- | --- | --- |\n"
    return head + "\n".join(
        f"| {name} | {arm['parameters']:,} | {arm['runs'][0]['steps']} | {_percent(arm['accuracy'])} "
        f"| {_number(arm['loss'])} |"
        for name, arm in _ordered(found)
    )


def _ordered(found: Arms) -> list[tuple[str, Any]]:
    """Arms by their value where it is a number; the base stands first in the JSON."""
    return sorted(found["arms"].items(), key=lambda item: float(item[0]))


def _written(found: Arms) -> str:
    lines = []
    for name, arm in found["arms"].items():
        for how, text in arm["runs"][0]["written"].items():
            lines.append(f"> **{name}, {how}:** {PROMPT}{text}\n>")
    return "\n".join(lines).removesuffix("\n>")


def _number(value: Arms) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _percent(value: Arms) -> str:
    return f"{100 * value['mean']:.1f} % [{100 * max(0.0, value['low']):.1f}, {100 * min(1.0, value['high']):.1f}]"


def _signed(value: Arms, scale: float = 1) -> str:
    mean, low, high = (scale * value[name] for name in ("mean", "low", "high"))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


# -- plots -------------------------------------------------------------------------------------------------------------


def draw(figures: Mapping[str, Any]) -> None:
    """The plots beside the JSON, the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "story", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    rates = [(float(name), arm["accuracy"]) for name, arm in _ordered(figures["rates"])]
    figure, axes = pyplot.subplots(figsize=(5, 2.6), layout="constrained")
    means = [100 * value["mean"] for _, value in rates]
    reach = [[100 * (value["mean"] - value["low"]) for _, value in rates],
             [100 * (value["high"] - value["mean"]) for _, value in rates]]  # fmt: skip
    axes.errorbar([rate for rate, _ in rates], means, reach, marker="o", capsize=3, label="causal, honest")
    axes.plot([1e-5, 3e-4, 1e-3], [0, 35, 100], "x--", color="gray", label="the report, answers in view")
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy, %", ylim=(-3, 103))
    axes.legend(frameon=False)
    _save(figure, "story_rates.svg")

    figure, axes = pyplot.subplots(figsize=(5, 2.6), layout="constrained")
    arms = figures["attention"]["arms"]
    before = [100 * arm["prefix_accuracy"]["mean"] for arm in arms.values()]
    sides = {"the text in view": [_in_view(arm) for arm in arms.values()], "the words before alone": before}
    for place, (label, values) in enumerate(sides.items()):
        axes.bar([index + 0.36 * place for index in range(len(arms))], values, 0.34, label=label)
    axes.set(ylabel="validation accuracy, %", ylim=(0, 103))
    axes.set_xticks([index + 0.18 for index in range(len(arms))], list(arms))
    axes.legend(frameon=False)
    _save(figure, "story_attention.svg")


def _save(figure: Any, name: str) -> None:
    figure.savefig(FOLDER / name, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", help=f"which to measure, of {', '.join(PIECES)} (default: all)")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    args = parser.parse_args(arguments)
    if unknown := set(args.pieces) - PIECES.keys():
        parser.error(f"there is no piece {', '.join(sorted(unknown))}; there are {', '.join(PIECES)}")
    torch.set_num_threads(1)
    figures = _kept()
    for name in [] if args.page else args.pieces or PIECES:
        if name in figures:
            continue
        started = time.process_time()
        measured = PIECES[name]()
        seconds = round(time.process_time() - started, 1)
        figures = _kept() | {name: measured | {"cpu_seconds": seconds}}
        FOLDER.mkdir(exist_ok=True)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {seconds} s", flush=True)
    if missing := [name for name in PIECES if name not in figures]:
        print(f"not measured yet: {', '.join(missing)}; the page is left as it is")
        return
    draw(figures)
    PAGE.write_text(page(figures), encoding="utf-8")
    print(PAGE)


def _kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    return found


if __name__ == "__main__":
    main()
