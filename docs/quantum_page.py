"""The page docs/quantum.md (template quantum.md.j2) and its plot, from the figures of docs/replay_quantum.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Runs = Mapping[str, Sequence[Any]]

PLOT = "replays/quantum.png"
REPORT = {  # after each of its three epochs
    "EOS": (0.2665, 0.8701, 0.9997), "coverage": (0.1316, 0.0759, 0.0486), "top": (0.8244, 0.8649, 0.8646),
}  # fmt: skip
DRAWN = (
    "sound", "sound, our balance", "polluted", "polluted, report's loss", "polluted, EOS penalty",
    "polluted, EOS weight", "report's model and rate",
)  # fmt: skip
NAMED = {0: "PAD", 1: "UNK", 2: "BOS", 3: "EOS"}


def write(figures: Mapping[str, Any], conditions: Mapping[str, str], setting: str, folder: Path) -> None:
    """docs/quantum.md and the plot. `conditions`: name and what it is; figures are named CONDITION/SEED."""
    from jinja2 import Template

    runs = {name: [run for key, run in figures.items() if key.rpartition("/")[0] == name] for name in conditions}
    if missing := [name for name, some in runs.items() if len(some) != len(runs["sound"])]:
        raise SystemExit(f"not all seeds are there of: {', '.join(missing)}")
    draw(runs, folder / PLOT)
    seconds = sum(run["seconds"] for some in runs.values() for run in some)
    text = Template((folder / "quantum.md.j2").read_text(encoding="utf-8")).render(
        setting=setting, conditions=conditions, seeds=len(runs["sound"]), minutes=round(seconds / 60), plot=PLOT,
        predicted=predicted(runs), sampled=sampled(runs), texts=[run["samples"]["texts"][0] for run in runs["sound"]],
        **told(runs),
    )  # fmt: skip
    (folder / "quantum.md").write_text(text.rstrip() + "\n", encoding="utf-8")


def predicted(runs: Runs) -> list[list[str]]:
    """Rows of the first table: what is predicted at the end of each condition, of the labels, and in the report."""
    rows = []
    for name, some in runs.items():
        last = [run["looks"][-1] for run in some]
        cells = [[look[key] for look in last] for key in ("eos_mean", "top_share", "coverage")]
        cells += [[run["first"][key] for run in some] for key in ("plain", "ended")]
        rows.append([name, *map(spread, cells), warned(some)])
    for name, title in (("sound", "*the corpus itself*"), ("polluted", "*the polluted labels*")):
        look = runs[name][0]["looks"][-1]
        asked = [f"{look[key]:.1%}" for key in ("asked_eos", "asked_top", "asked_coverage")]
        rows.append([title, *asked, "", "", ""])
    reported = [", ".join(f"{value:.2%}" for value in REPORT[key]) for key in ("EOS", "top", "coverage")]
    return [*rows, ["*the report, epochs 1 to 3*", *reported, "97.9%", "", ""]]


def sampled(runs: Runs) -> list[list[str]]:
    """Rows of the second table: samples of each condition, and as much of the corpus."""
    rows = []
    for name, some in runs.items():
        samples = [run["samples"] for run in some]
        cells = [[sample[key] for sample in samples] for key in ("empty", "eos")]
        cells += [[sample["words"] / max(1, sample["corpus_words"]) for sample in samples]]
        cells += [[sample[key] for sample in samples] for key in ("distinct_2", "repetition")]
        rows.append([name, *map(spread, cells)])
    corpus = runs["sound"][0]["samples"]
    own = (0.0, corpus["corpus_eos"], 1.0, corpus["corpus"]["distinct_2"], corpus["corpus"]["repetition"])
    return [*rows, ["*the corpus*", *(f"{value:.1%}" for value in own)]]


def told(runs: Runs) -> dict[str, Any]:
    """What the page's sentences are filled with: medians over seeds."""

    def median(name: str, read: Callable[[Any], float]) -> float:
        return statistics.median(read(run) for run in runs[name])

    def look(name: str, place: int = -1) -> dict[str, str]:
        keys = ("eos_mean", "asked_eos", "top_share", "coverage")
        found = {key: f"{median(name, lambda run, key=key: run['looks'][place][key]):.1%}" for key in keys}
        return {**found, "loss": f"{median(name, lambda run: run['looks'][place]['loss']):.2f}"}

    def share(name: str, key: str) -> str:
        return f"{median(name, lambda run: run['samples'][key]):.1%}"

    def ended(name: str) -> str:
        return spread([run["first"]["ended"] for run in runs[name]])

    def costs(name: str) -> str:
        found = [own["looks"][-1]["loss"] - sound["looks"][-1]["loss"] for own, sound in zip(runs[name], runs["sound"])]
        return f"{min(found):+.2f} to {max(found):+.2f}"

    alike = max(
        abs(left["loss"] - right["loss"])
        for name in ("sound", "polluted")
        for one, two in zip(runs[name], runs[f"{name}, report's loss"])
        for left, right in zip(one["looks"], two["looks"])
    )
    tops = sorted({run["looks"][-1]["top"] for run in runs["polluted, EOS penalty"]})
    return {
        "sound": look("sound"), "polluted": look("polluted"), "penalty": look("polluted, EOS penalty"),
        "ours": look("sound, our balance"), "little": look("sound, a little of our balance"),
        "ours_polluted": look("polluted, our balance"), "rate": look("report's rate"),
        "rate_first": look("report's rate", 0), "model": look("report's model and rate"),
        "model_first": look("report's model and rate", 0),
        "ended": ended("polluted"), "alike": f"{alike:.1g}",
        "penalty_top": " or ".join(NAMED.get(token, f"token {token}") for token in tops),
        "weight_empty": share("polluted, EOS weight", "empty"), "polluted_empty": share("polluted", "empty"),
        "weight_eos": share("polluted, EOS weight", "eos"), "corpus_eos": share("sound", "corpus_eos"),
        "weight_likeliest": f"{median('polluted, EOS weight', lambda run: run['looks'][-1]['eos_likeliest']):.1%}",
        "ours_costs": costs("sound, our balance"), "little_costs": costs("sound, a little of our balance"),
        "after_empty": share("after a collapse", "empty"), "after_ended": ended("after a collapse"),
        "after_ours_ended": ended("after a collapse, our balance"),
    }  # fmt: skip


def spread(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "none"
    middle, low, high = (f"{value:.1%}" for value in (statistics.median(found), min(found), max(found)))
    return middle if low == high else f"{middle} [{low}, {high}]"


def warned(some: Sequence[Any]) -> str:
    """The first alert's step and cause, where there was one."""
    first = sorted({f"{step}, `{cause}`" for run in some for step, cause in run["alerts"][:1]})
    quiet = sum(not run["alerts"] for run in some)
    return "; ".join([*first, *([f"not in {quiet} of {len(some)}"] if first and quiet else [])]) or "not"


def draw(runs: Mapping[str, Sequence[Any]], file: Path) -> None:
    """EOS, top token and coverage over steps, median and range over seeds, beside the corpus' and the report's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    panels = (
        ("eos_mean", "asked_eos", "EOS"),
        ("top_share", "asked_top", "top"),
        ("coverage", "asked_coverage", "coverage"),
    )
    titles = ("mean probability of EOS", "share of the commonest prediction", "vocabulary that is predicted")
    for axis, (key, asked, report), title in zip(axes, panels, titles):
        for name in DRAWN:
            steps = [look["step"] for look in runs[name][0]["looks"]]
            table = [[run["looks"][i][key] for run in runs[name]] for i in range(len(steps))]
            (line,) = axis.plot(steps, [statistics.median(row) for row in table], label=name)
            axis.fill_between(
                steps, [min(row) for row in table], [max(row) for row in table], alpha=0.15, color=line.get_color()
            )
        axis.axhline(
            runs["sound"][0]["looks"][-1][asked], color="black", linestyle="--", linewidth=1, label="the corpus"
        )
        axis.plot((100, 200, 300), REPORT[report], "x", color="black", label="the report, epochs 1 to 3")
        axis.set(title=title, xlabel="optimizer step", xscale="symlog", ylim=(-0.02, 1.02))
    axes[2].set(ylim=(-0.005, 0.26))
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)
