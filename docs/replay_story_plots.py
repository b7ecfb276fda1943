"""The plots of docs/story.md, from what `replay_story.py` has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from replay_story_page import Figures, in_view, ordered


def draw(figures: Figures, folder: Path) -> None:
    """Both plots into `folder`, the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "story", "svg.fonttype": "none", "font.size": 9})
    for name, plot in {"rates": _rates, "attention": _attention}.items():
        plot(figures[name]).savefig(folder / f"story_{name}.svg", metadata={"Date": None})


def _rates(found: Figures) -> Any:
    from matplotlib import pyplot

    rates = [(float(name), arm["accuracy"]) for name, arm in ordered(found)]
    figure, axes = pyplot.subplots(figsize=(5, 2.6), layout="constrained")
    means = [100 * value["mean"] for _, value in rates]
    reach = [[100 * (value["mean"] - value["low"]) for _, value in rates],
             [100 * (value["high"] - value["mean"]) for _, value in rates]]  # fmt: skip
    axes.errorbar([rate for rate, _ in rates], means, reach, marker="o", capsize=3, label="causal, honest")
    axes.plot([1e-5, 3e-4, 1e-3], [0, 35, 100], "x--", color="gray", label="the report, answers in view")
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy, %", ylim=(-3, 103))
    axes.legend(frameon=False)
    return figure


def _attention(found: Figures) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 2.6), layout="constrained")
    arms = found["arms"]
    before = [100 * arm["prefix_accuracy"]["mean"] for arm in arms.values()]
    sides = {"the text in view": [in_view(arm) for arm in arms.values()], "the words before alone": before}
    for place, (label, values) in enumerate(sides.items()):
        axes.bar([index + 0.36 * place for index in range(len(arms))], values, 0.34, label=label)
    axes.set(ylabel="validation accuracy, %", ylim=(0, 103))
    axes.set_xticks([index + 0.18 for index in range(len(arms))], list(arms))
    axes.legend(frameon=False)
    return figure
