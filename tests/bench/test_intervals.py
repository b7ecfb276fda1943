"""The interval holds what it promises, also where timings are as ugly as they are."""

from __future__ import annotations

import numpy as np
import pytest

from lmconform.bench.intervals import fewest, median_interval


@pytest.mark.parametrize(
    ("count", "ends"),
    [(6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (10, (2, 9)), (12, (3, 10)), (15, (4, 12)), (20, (6, 15))],
)
def test_ends_are_those_of_the_sign_test(count: int, ends: tuple[int, int]) -> None:
    """Places in the ordered sample at 95 %, from the table in Conover's Practical Nonparametric Statistics."""
    values = [float(place) for place in range(1, count + 1)]
    assert median_interval(values[::-1]) == ((count + 1) / 2, *ends)


@pytest.mark.parametrize(("level", "count"), [(0.9, 5), (0.95, 6), (0.99, 8)])
def test_too_few_values_are_refused(level: float, count: int) -> None:
    assert fewest(level) == count
    median_interval([1.0] * count, level)
    with pytest.raises(ValueError, match=f"it takes {count}"):
        median_interval([1.0] * (count - 1), level)


@pytest.mark.parametrize("noise", ["normal", "bursts", "one_sided"])
@pytest.mark.parametrize("count", [6, 10, 20])
def test_at_least_95_of_100_intervals_hold_the_true_median(noise: str, count: int) -> None:
    """Of 4000 drawn samples; 3 standard deviations of that count are allowed for."""
    draw = np.random.default_rng(0)
    samples = draw.normal(0.0, 0.05, (4000, count))
    if noise == "bursts":  # a fifth of the rounds is disturbed, on either side
        samples += draw.choice([0.0, 0.8, -0.8], p=[0.8, 0.1, 0.1], size=samples.shape)
    if noise == "one_sided":
        samples = draw.exponential(0.05, samples.shape) - 0.05 * np.log(2)
    held = sum(low <= 0 <= high for _, low, high in map(median_interval, samples.tolist()))
    assert held >= 3800 - 3 * (4000 * 0.95 * 0.05) ** 0.5
