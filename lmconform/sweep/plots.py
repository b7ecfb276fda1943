"""The curve of a sweep, loss by rate: in the terminal and as a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lmconform.options import OptionError
from lmconform.sweep.rates import Outcome

HEIGHT = 9
COLUMN = 4


def require_matplotlib() -> None:
    """Raises OptionError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError("the PNG needs matplotlib: pip install 'lmconform[report]'") from error


def terminal_curve(outcome: Outcome, given: float | None = None) -> list[str]:
    """Lines of text: the loss at the end over the rate, `●` the median, `│` from the lowest to the highest seed.

    Below it: `=` the good range, `^` the recommended rate, `u` the user's own.
    """
    rows = outcome.rows
    finite = [row.high for row in rows if math.isfinite(row.high)]
    top = max([*finite, rows[0].start])
    bottom = min([top, *(row.low for row in rows)])

    def level(value: float) -> int:
        share = (min(value, top) - bottom) / (top - bottom or 1)
        return round((HEIGHT - 1) * share)

    lines = []
    for height in range(HEIGHT - 1, -1, -1):
        value = bottom + (top - bottom) * height / (HEIGHT - 1)
        cells = []
        for row in rows:
            if not math.isfinite(row.final):
                mark = "x" if height == HEIGHT - 1 else " "
            elif level(row.final) == height:
                mark = "●"
            else:
                mark = "│" if level(row.low) <= height <= level(row.high) else " "
            cells.append(mark.center(COLUMN))
        lines.append(f"{value:7.2f} ┤{''.join(cells)}".rstrip())
    lines.append(" " * 8 + "└" + "─" * (COLUMN * len(rows)))
    marks = ["=" * COLUMN if row.good else " " * COLUMN for row in rows]
    if outcome.recommended is not None:
        index = next(index for index, row in enumerate(rows) if row.rate == outcome.recommended)
        marks[index] = marks[index][0] + "^" + marks[index][2:]
    if given is not None:
        nearest = min(range(len(rows)), key=lambda index: abs(math.log(rows[index].rate / given)))
        marks[nearest] = marks[nearest][:2] + "u" + marks[nearest][3:]
    lines.append(" " * 9 + "".join(marks).rstrip())
    first, last = f"{rows[0].rate:.0e}", f"{rows[-1].rate:.0e}"
    lines.append(" " * 9 + first + last.rjust(max(1, COLUMN * len(rows) - len(first))))
    legend = ["● median loss at the end", "│ over the seeds", "x diverged", "= good range", "^ recommended"]
    lines.append(" " * 9 + ", ".join([*legend, *(["u yours"] if given is not None else [])]))
    return lines


def draw(file: str, outcome: Outcome, title: str, given: Sequence[tuple[float, str]] = ()) -> None:
    """Write the curve as a PNG."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [row for row in outcome.rows if math.isfinite(row.final)]
    rates = [row.rate for row in shown]
    axes.plot(rates, [row.final for row in shown], marker="o", color="C0", label="median over seeds")
    highs = [row.high if math.isfinite(row.high) else row.final for row in shown]
    axes.fill_between(rates, [row.low for row in shown], highs, color="C0", alpha=0.2, label="lowest to highest seed")
    gone = [row.rate for row in outcome.rows if row.diverged]
    if gone:
        axes.plot(gone, [max(highs, default=1.0)] * len(gone), "x", color="C3", label="diverged")
    if outcome.good_range is not None:
        axes.axvspan(*outcome.good_range, color="C2", alpha=0.15, label="good range")
    if outcome.recommended is not None:
        axes.axvline(outcome.recommended, color="C2", label=f"recommended {outcome.recommended:.2g}")
    for rate, label in given:
        axes.axvline(rate, color="C1", linestyle="--", label=label)
    axes.set(xscale="log", xlabel="learning rate (AdamW)", ylabel=f"loss after {outcome.steps} steps", title=title)
    axes.legend(fontsize="small")
    figure.savefig(file, format="png")
