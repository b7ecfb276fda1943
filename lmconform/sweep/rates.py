"""What a sweep over learning rates says: the rows of its table, the good range, the recommended rate."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform.options import OptionError

if TYPE_CHECKING:
    from torch import nn

    from lmconform.sweep.members import Training

GOOD_SHARE = 0.9  # of the best rate's progress that a good rate makes
ASSUMED_STEPS = 1000  # of a run whose length is not stated
FOLLOWED = 2000  # steps that a scheduler is followed for, to see its highest rate


@dataclass(frozen=True)
class Row:
    """One rate over all seeds. `final`: median over seeds of the loss at the end; infinite where it diverged."""

    rate: float
    start: float
    final: float
    low: float
    high: float
    over_time: float
    diverged: int
    seeds: int
    good: bool = False

    @property
    def state(self) -> str:
        if self.diverged:
            return "diverged" if self.diverged == self.seeds else f"{self.diverged} of {self.seeds} diverged"
        return "good" if self.good else "learns less"


@dataclass(frozen=True)
class Outcome:
    """Rows by rising rate. `good_range` is None where no rate learnt, `recommended` then too."""

    rows: list[Row]
    good_range: tuple[float, float] | None
    recommended: float | None
    steps: int
    target: float

    @property
    def best(self) -> Row:
        return min(self.rows, key=lambda row: (row.final, row.over_time))

    def place(self, rate: float, steps: int | None = None) -> str:
        """Where a rate lies: "good", "too small" or "too large".

        A run of more steps than were swept gets as far with a rate that much smaller. The sweep looks at some rates
        alone: what lies nearer to the last good one than to its neighbour counts as good.
        """
        if self.good_range is None:
            return "unknown"
        rates = [row.rate for row in self.rows]
        first, last = (rates.index(rate) for rate in self.good_range)
        low = math.sqrt(rates[first] * rates[max(first - 1, 0)])
        high = math.sqrt(rates[last] * rates[min(last + 1, len(rates) - 1)])
        longer = max(1.0, (steps if steps is not None else self.steps) / self.steps)
        slack = 1 + 1e-6
        if rate * slack < low / longer:
            return "too small"
        return "too large" if rate > high * slack else "good"


def parse_rates(text: str) -> list[float]:
    """`1e-5:1e-1:12` (first, last, how many, evenly by factor) or `1e-4,3e-4`. Raises OptionError."""
    usage = "as in 1e-5:1e-1:12 (first:last:how many) or 1e-4,3e-4"
    try:
        if ":" in text:
            first, last, count = text.split(":")
            low, high, number = float(first), float(last), int(count)
        else:
            rates = sorted({float(part) for part in text.split(",")})
            low, high, number = rates[0], rates[-1], 0
    except ValueError:
        raise OptionError(f"--rates {text!r} is not understood; write it {usage}") from None
    if not (0 < low <= high < math.inf):
        raise OptionError(f"--rates {text!r}: rates are above 0 and rise, {usage}")
    if ":" not in text:
        return rates
    if not 1 <= number <= 1000 or (number == 1) != (low == high):
        raise OptionError(f"--rates {text!r}: between 2 and 1000 rates, {usage}")
    return spaced(low, high, number)


def spaced(low: float, high: float, count: int) -> list[float]:
    """`count` rates from low to high, each the same factor above the one before."""
    if count == 1:
        return [low]
    return [low * (high / low) ** (index / (count - 1)) for index in range(count)]


def outcome(training: Training, steps: int, target: float) -> Outcome:
    """Read a training of rates x seeds. A rate has learnt something where its loss ends below `target`."""
    rates = sorted({member.rate for member in training.members})
    rows = [_row(training, rate, steps) for rate in rates]
    finite = [row for row in rows if not row.diverged]
    best = min(finite, key=lambda row: (row.final, row.over_time), default=None)
    if best is None or not best.final < target:
        return Outcome(rows, None, None, steps, target)
    enough = best.start - GOOD_SHARE * (best.start - best.final)
    center = rows.index(best)
    low = high = center
    while low > 0 and _good(rows[low - 1], enough):
        low -= 1
    while high + 1 < len(rows) and _good(rows[high + 1], enough):
        high += 1
    rows = [_marked(row, low <= index <= high) for index, row in enumerate(rows)]
    # the top of the range is next to where it diverges; without room below there is no choice
    candidates = rows[low:high] if high - low >= 2 else rows[low : high + 1]
    chosen = min(candidates, key=lambda row: row.over_time)
    return Outcome(rows, (rows[low].rate, rows[high].rate), chosen.rate, steps, target)


def _good(row: Row, enough: float) -> bool:
    return not row.diverged and row.final <= enough


def _marked(row: Row, good: bool) -> Row:
    return Row(**{**row.__dict__, "good": good})


def _row(training: Training, rate: float, steps: int) -> Row:
    finals, means, starts = [], [], []
    diverged = 0
    for member, losses, gone in zip(training.members, training.losses, training.diverged, strict=True):
        if member.rate != rate:
            continue
        diverged += gone
        tail = losses[-max(1, min(len(losses), steps // 10)) :] if len(losses) == steps else losses[-1:]
        finals.append(math.inf if gone else sum(tail) / len(tail))
        means.append(math.inf if gone else (sum(losses) + losses[-1] * (steps - len(losses))) / steps)
        starts.append(losses[0])
    return Row(
        rate, statistics.median(starts), statistics.median(finals), min(finals), max(finals), statistics.median(means),
        diverged, len(finals),
    )  # fmt: skip


@dataclass(frozen=True)
class GivenRate:
    """The highest rate that a recipe's optimizer reaches; `steps`: optimizer steps of its run, None if not stated."""

    rate: float
    steps: int | None
    stated: float
    words: str


def given_rate(recipe: Any, module: nn.Module) -> GivenRate | str:
    """The rate of a recipe, as its optimizer and scheduler really reach it, or why there is none to compare."""
    if recipe is None:
        return "no recipe was given"
    make = getattr(recipe, "make_optimizer", None)
    stated = getattr(recipe, "learning_rate", None)
    total = recipe.steps() if hasattr(recipe, "steps") else getattr(recipe, "total_steps", None)
    if make is None:
        if stated is None:
            return "the recipe gives neither learning_rate nor make_optimizer"
        return GivenRate(float(stated), total, float(stated), f"{stated:g}")
    optimizer = recipe.optimizers(module)[0]
    if "adam" not in type(optimizer).__name__.lower():
        return f"the recipe's optimizer is {type(optimizer).__name__}, and the sweep is of AdamW"
    rates = [group.get("lr") for group in optimizer.param_groups]
    if any(rate is None for rate in rates):
        return "the recipe's optimizer chooses its own rate (lr=None)"
    base = max(map(float, rates))
    if getattr(recipe, "make_scheduler", None) is None:
        return GivenRate(base, total, base, f"{base:g}")
    reached = _highest(recipe, optimizer, total)
    words = f"{reached:.3g} at its highest" + (f" (the optimizer says {base:g})" if not _near(reached, base) else "")
    return GivenRate(reached, total, base, words)


def _near(rate: float, other: float) -> bool:
    return abs(rate - other) <= 1e-3 * abs(other)


def _highest(recipe: Any, optimizer: Any, total: int | None) -> float:
    """The highest rate while the scheduler is stepped as its interval says."""
    length = total or ASSUMED_STEPS
    scheduler = recipe.make_scheduler(optimizer, length)
    each = recipe.steps_each_epoch() if hasattr(recipe, "steps_each_epoch") else None
    interval = getattr(recipe, "interval", "step")
    highest = 0.0
    for step in range(1, min(length, FOLLOWED) + 1):
        highest = max(highest, *(float(group["lr"]) for group in optimizer.param_groups))
        optimizer.step()
        if interval == "epoch":
            if each is not None and step % each == 0:
                scheduler.step()
        else:
            for _ in range(getattr(recipe, "accumulation", 1) if interval == "batch" else 1):
                scheduler.step()
    return highest
