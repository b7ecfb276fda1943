"""A confidence interval for a median that assumes nothing about the distribution."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def fewest(level: float) -> int:
    """How many values an interval of that level takes: 6 for 95 %."""
    return 1 + math.ceil(-math.log2(1 - level))


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Median of `values`, and the ends of an interval that holds the true median with at least that probability.

    The ends are two of the values themselves, found by inverting the sign test (Conover, Practical Nonparametric
    Statistics, 3.2): each value lies below the true median with probability 1/2 whatever its distribution, so the
    number below is binomial. A t interval of log ratios wants normal ones and is widened by a single disturbed round;
    a bootstrap of the median of ten values promises 95 % and covers less.

    Raises ValueError for fewer than `fewest(level)` values.
    """
    count = len(values)
    if count < fewest(level):
        raise ValueError(f"{count} values give no interval of {level:.0%}; it takes {fewest(level)}")
    ordered = sorted(values)
    below, tail = 0, 0.5**count  # tail: the probability of at most `below` values on one side
    while 2 * (tail + math.comb(count, below + 1) * 0.5**count) <= 1 - level:
        below += 1
        tail += math.comb(count, below) * 0.5**count
    return statistics.median(ordered), ordered[below], ordered[count - 1 - below]
