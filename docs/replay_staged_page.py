"""What `replay_staged.py` has measured, as docs/staged.md and its plot."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEAD = """\
# staged: MU, TEMPORAL, K-1 and graph routing, one stage at a time

Written by `python docs/replay_staged.py`.

    from models.staged import StagedConfig, StagedForCausalLM

    model = StagedForCausalLM(StagedConfig.sized("tiny", stage=0, vocab_size=1024))   # "small", "report"
    model.save_pretrained("stage0")
    model = StagedForCausalLM.from_pretrained("stage0", stage=1)      # the same logits; the new part is learnt

In a checkout of the repository (`models` is not in the package). Data are found in the folder that `LMCONFORM_DATA`
names; without `--max-steps` one epoch is trained.

```bash
python -m models train staged --datasets wikitext-2 --max-length 128 --max-steps 400 --experiment-name stage0
python -m models train staged --datasets wikitext-2 --max-length 128 --max-steps 400 --experiment-name stage1 \\
    --stage 1 --model experiments/stage0/final --learning-rate 5e-3
python -m models diagnose experiments/stage1/final       # parameters, gradients, memory, writing; then the suite
pytest -k staged
```

| stage | adds | starts as |
| --- | --- | --- |
| 0, MU | the token state and its projector to the operators' width | |
| 1, TEMPORAL | a time vector for each token, turned by its position | zero vectors, which no turning moves |
| 2, K-1 | a scaling of the gradients between backward and clipping | nothing in the forward |
| 3, graph routing | attention along edges | all edges open; training closes those that are none |

**MU** (`models/staged/unit.py`), with `use_full_model`: the state is an 8x8 matrix of sixteen 2x2 blocks, updated by
causal attention over time within each block, attention from block to block, a feed-forward, and a sensitivity s in (0,
1) of each token, M <- M + s (new - M). Without it the state is a plain embedding of any width. The operators are
pre-norm attention with RoPE and a GELU feed-forward.

**TEMPORAL** (`models/staged/temporal.py`): the projector is LayerNorm(A state + B R(p) time), where R(p) turns the time
vector by the token's position p as RoPE turns keys. One table holds state and time vector, so `inputs_embeds` carry
both.

**K-1** (`models/staged/credit.py`) halves the layers into a tree and gives each node twice its share of what it and its
sibling have earned, which is a running mean of their gradients' norms. The norm of the whole stays what it was, no part
keeps less than a tenth of its gradient, and a part without any is named. It is a Trainer callback: the Trainer clips
before it calls anybody, so `max_grad_norm` is 0 there and K-1 clips behind its scaling, once an optimizer step,
accumulated or not.

**The graph** (`models/staged/graph.py`) is a function of positions and of the tokens' own embeddings, so other rows,
padding and caching change nothing. Shortcuts: a hash draws for each position a residue class modulo n, and the token
attends to every earlier one in it, which links each pair with probability 1 / n. Between any token and the query the
next shortcut is at most n - 1 tokens away, which the windows of the other layers bridge: every earlier token is reached
within the depth, and a config that would leave one out is refused. An edge by meaning opens by and by, over 0.2 of
the cosine, so that what the model computes stays continuous in its weights. During stage 3 `graph_openness`, the weight
of a token without an edge, goes from 1 (dense, exactly the stage before) to 0. It is routing as a mask: nothing is
computed faster.

## What was wrong

| in the report | cause | the suite says so by |
| --- | --- | --- |
| a perplexity near 1, and gibberish | no causal mask in any stage | `causality.no_future_leak` |
| no grammar at stages 0 to 2 | no positions | `positions.order_matters` |
| rows that change with their neighbours | semantic edges taken from row 0 of the batch | `batching.row_independence` |
| blocks of unrelated numbers | block order against matrix layout | `parity.hidden`, beside a reference |

The last shows only beside a reference: by itself such a model is another one, and as sound.

Size, which the report names first, was secondary: `tests/staged` memorises a sentence to a loss below 0.1 within 100
steps with less than 100,000 parameters, at every stage.
"""


def write(folder: Path, page: Path) -> None:
    """The page and the plot from what is in `folder`."""
    done = json.loads((folder / "staged.json").read_text(encoding="utf-8"))
    plot(done, folder / "staged.png")
    lines = [HEAD, *equal_budgets(done), *chain(done), *credit(done), *report_size(folder / "staged_report_size.json")]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def flow(text: str) -> str:
    """A paragraph, in lines as long as the page's others."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def runs_of(done: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    return [done["runs"][key] for seed in done["setup"]["seeds"] if (key := f"{arm}, seed {seed}") in done["runs"]]


def at(run: dict[str, Any], step: int, which: int) -> float:
    """The loss in nats a token: `which` is 1 for training text, 2 for validation."""
    return float(next(mark[which] for mark in run["marks"] if mark[0] == step))


def perplexity(losses: Sequence[float]) -> float:
    return math.exp(statistics.mean(losses))


def beside(one: list[dict[str, Any]], other: list[dict[str, Any]], step: int) -> str:
    """Difference in validation loss of paired runs: the mean over the seeds with its 95 % interval."""
    found = difference(one, other, step)
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def difference(one: list[dict[str, Any]], other: list[dict[str, Any]], step: int) -> dict[str, float]:
    from models.training.comparison import interval

    return interval([at(a, step, 2) - at(b, step, 2) for a, b in zip(one, other)])


def equal_budgets(done: dict[str, Any]) -> list[str]:
    from replay_staged import ARMS

    setup, seeds = done["setup"], done["setup"]["seeds"]
    arms = [arm for arm in setup["arms"] if len(runs_of(done, arm)) == len(seeds)]
    tokens = setup["batch"] * setup["time"]
    last = setup["steps"]
    sizes = setup["sizes"]
    seconds = sum(run["seconds"] for run in done["runs"].values())
    marks = setup["marks"]
    lines = [
        "## Equal budgets",
        "",
        flow(f"""
            WikiText-2, {setup["rows"]:,} of its lines, byte pairs of {setup["vocabulary"]:,} tokens made from them;
            {last} steps of {setup["batch"]} blocks of {setup["time"]} tokens ({last * tokens:,} in all), AdamW at
            {setup["rate"]:g}, {setup["warmup"]} steps of warm-up, linear decay, clipping at 1; state
            {sizes["embed_dim"]}, time {sizes["time_dim"]}, width {sizes["hidden_size"]}, {sizes["num_hidden_layers"]}
            operators. Seeds {", ".join(map(str, seeds))}: all arms of a seed see the same blocks in the same order, and
            all stages with a plain embedding start from the same weights. Losses in evaluation mode on
            {setup["judged"]} blocks of the training text, seen early in the run, and on as many of the test file, which
            is the easier text of the two. Perplexity is by token of this vocabulary and compares with no other. On one
            core of a shared machine, torch {done["versions"]["torch"]}, {seconds:.0f} s of processor time for all runs.
            How wide new parts start, MU's first sensitivity and the span of K-1's running mean were chosen on one to
            three of these runs by the same test text: the stages' figures are a little too good by that choice.
        """),
        "",
        "![perplexity over steps](replays/staged.png)",
        "",
        f"| arm | parameters | {' | '.join(f'{step} steps' for step in marks)} | beside stage 0 | beside plain |",
        "| --- | --- | " + "--- | " * len(marks) + "--- | --- |",
    ]
    for arm in arms:
        runs = runs_of(done, arm)
        told = [
            " / ".join(f"{perplexity([at(run, step, which) for run in runs]):.1f}" for which in (1, 2))
            for step in marks
        ]
        zero = beside(runs, runs_of(done, "stage 0"), last) if arm != "stage 0" else ""
        plain = beside(runs, runs_of(done, "plain"), last) if arm != "plain" else ""
        lines.append(f"| {arm}: {ARMS[arm]} | {runs[0]['parameters']:,} | {' | '.join(told)} | {zero} | {plain} |")
    lines += [
        "",
        flow("""
            Perplexity on training / validation text, the geometric mean over the seeds. Beside stage 0 and the plain
            decoder: difference of the validation loss at the end, in nats a token (below 0 is better), mean over the
            seeds and its 95 % interval (Student's t).
        """),
        "",
        *verdict(done),
    ]
    return lines


def verdict(done: dict[str, Any]) -> list[str]:
    """Whether a later stage is worse than the one before it, by the interval of the paired difference."""
    last = done["setup"]["steps"]
    lines = []
    for stage in (1, 2, 3):
        here, before = (runs_of(done, f"stage {number}") for number in (stage, stage - 1))
        if not here or len(here) != len(before):
            continue
        found = difference(here, before, last)
        if found["high"] < 0:
            told = "better"
        elif found["low"] > 0:
            told = "worse"
        else:
            told = "no worse and no better that these seeds could show"
        worse = sum(at(a, last, 2) > at(b, last, 2) for a, b in zip(here, before))
        lines.append(
            f"- Stage {stage} beside stage {stage - 1}: {beside(here, before, last)} nats, {told}; higher with {worse} "
            f"of {len(here)} seeds."
        )
    return [*lines, ""]


def chain(done: dict[str, Any]) -> list[str]:
    runs = runs_of(done, "chain")
    if not runs:
        return []
    steps = done["setup"]["steps"]
    jumps = [jump for run in runs for jump in run["jumps"]]
    return [
        "## From stage to stage",
        "",
        flow(f"""
            The arm `chain` trains a quarter of the steps at each stage, the next stage from the weights of the last and
            with a new optimizer, on the same blocks and rates as the others. {len(jumps)} switches: logits move by at
            most {max(jumps):.1e} of their standard deviation (allowed 1e-05; `tests/staged/test_stages.py` holds all
            ways to it). Its validation loss at the end beside stage 0 for the whole budget:
            {beside(runs, runs_of(done, "stage 0"), steps)} nats; beside stage 3 from the start:
            {beside(runs, runs_of(done, "stage 3"), steps)}.
        """),
        "",
    ]


def credit(done: dict[str, Any]) -> list[str]:
    on, alone, off = (runs_of(done, arm) for arm in ("stage 2", "stage 2, K-1 by step", "stage 1"))
    if not on or not len(on) == len(alone) == len(off):
        return []
    lines = [
        "## K-1 off and on",
        "",
        flow("""
            Stage 2 without K-1 is stage 1: same weights, same blocks. Validation loss with K-1 less that without, in
            nats a token:
        """),
        "",
        "| steps | credit as a running mean (0.99) | credit by each step alone |",
        "| --- | --- | --- |",
    ]
    for step in done["setup"]["marks"]:
        lines.append(f"| {step} | {beside(on, off, step)} | {beside(alone, off, step)} |")
    return [
        *lines,
        "",
        flow("""
            AdamW divides every parameter's gradient by its own recent size, so a factor that stays the same cancels,
            and K-1 with it. Where the shares jitter from step to step the division takes the largest for the usual,
            and the layer learns more slowly: that is why the credit is a running mean.
        """),
        "",
    ]


def report_size(file: Path) -> list[str]:
    lines = [
        "## At the report's size",
        "",
        flow("""
            512 / 128 / 1024, six operators of eight heads, GPT-2's byte pairs: 160 M parameters. Stage 0 and the
            chain, 5,000 steps of 16 blocks of 512 tokens in bfloat16:
        """),
        "",
        "    LMCONFORM_DATA=... python docs/replay_staged.py --report-size --device cuda",
        "",
    ]
    if not file.exists():
        return [
            *lines,
            flow("""
                Not run: it needs a GPU. The report's figures (training perplexity 3000, 148, 55 and 20 after 100, 500,
                1000 and 5000 steps) are what its author expected, and were not measured either.
            """),
        ]
    from replay_staged import REPORT

    done = json.loads(file.read_text(encoding="utf-8"))
    lines += ["| steps | report, expected | training | validation |", "| --- | --- | --- | --- |"]
    for step, loss, held_out in runs_of(done, "stage 0")[0]["marks"]:
        lines.append(f"| {step} | {REPORT[step]} | {math.exp(loss):.1f} | {math.exp(held_out):.1f} |")
    return lines


def plot(done: dict[str, Any], file: Path) -> None:
    """Perplexity over steps: the geometric mean over the seeds, and their range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    setup = done["setup"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for which, (axes, title) in enumerate(zip(figure.subplots(1, 2), ("training text", "validation text")), 1):
        for arm in setup["arms"]:
            runs = runs_of(done, arm)
            if not runs:
                continue
            losses = [[at(run, step, which) for run in runs] for step in setup["marks"]]
            style = "--" if arm == "plain" else ":" if "full" in arm else "-"
            (line,) = axes.plot(setup["marks"], [perplexity(some) for some in losses], style, label=arm, marker=".")
            axes.fill_between(
                setup["marks"], [math.exp(min(some)) for some in losses], [math.exp(max(some)) for some in losses],
                color=line.get_color(), alpha=0.12, linewidth=0,
            )  # fmt: skip
        axes.set(title=title, xlabel="optimizer steps", ylabel="perplexity", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)
