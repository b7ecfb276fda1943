"""Two tasks in turns, on a clock that the test winds."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import pytest

from lmconform.bench import Task, compare


class Wound:
    """A clock that shows what the tasks said they take; `drift` is added at every reading."""

    name = "wound"

    def __init__(self, drift: float = 0.0) -> None:
        self.drift = drift
        self.taken = 0.0
        self.readings = 0
        self.order = ""

    def task(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.order += name
            self.taken = seconds

        return run

    def seconds(self, run: Callable[[], object]) -> float:
        run()
        self.readings += 1
        return self.taken + self.drift * self.readings


def test_turns_are_abba_and_baab_after_the_warm_up() -> None:
    clock = Wound()
    compare(clock.task("s", 1.0), clock.task("p", 1.0), rounds=6, warmup=2, clock=clock)
    assert clock.order == "spsp" + ("spps" + "pssp") * 3


def test_the_ratio_is_subject_over_peer() -> None:
    clock = Wound()
    found = compare(clock.task("s", 3.0), clock.task("p", 2.0), rounds=6, clock=clock)
    assert (found.ratio, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert (found.median, found.peer_median) == (3.0, 2.0)
    assert len(found.seconds) == len(found.peer_seconds) == 12
    assert str(found) == "1.50 [1.50, 1.50]"


def test_a_machine_that_gets_slower_falls_on_both() -> None:
    """By a hundredth of the first time at every run: by half in all."""
    clock = Wound(drift=0.01)
    found = compare(clock.task("s", 1.0), clock.task("p", 1.0), rounds=12, clock=clock)
    assert found.low < 1 < found.high
    assert found.ratio == pytest.approx(1, abs=1e-3)


def test_slower_only_where_the_whole_interval_is() -> None:
    clock = Wound()
    found = compare(clock.task("s", 1.2), clock.task("p", 1.0), rounds=6, clock=clock)
    assert found.slower_than(1.1)
    assert not found.slower_than(1.3)
    times = itertools.cycle([1.3] * 8 + [0.9] * 4)  # four slow rounds of two runs, then two quick ones

    def restless() -> None:
        clock.taken = next(times)

    unsure = compare(Task(restless), clock.task("p", 1.0), rounds=6, warmup=0, clock=clock)
    assert unsure.ratio > 1.1
    assert not unsure.slower_than(1.1)


def test_what_prepares_a_run_is_not_timed() -> None:
    clock = Wound()

    def prepare() -> tuple[float]:
        clock.order += "-"
        return (5.0,)

    def run(seconds: float) -> None:
        clock.taken = seconds

    found = compare(Task(run, prepare), clock.task("p", 1.0), rounds=6, warmup=0, clock=clock)
    assert found.ratio == pytest.approx(5.0)
    assert clock.order.count("-") == 12


def test_too_few_rounds_are_refused_before_anything_runs() -> None:
    clock = Wound()
    with pytest.raises(ValueError, match="5 values give no interval of 95%"):
        compare(clock.task("s", 1.0), clock.task("p", 1.0), rounds=5, clock=clock)
    assert not clock.order


@pytest.mark.parametrize("raises", [False, True])
def test_the_collector_is_as_before(raises: bool) -> None:
    def run() -> None:
        assert not gc.isenabled()
        if raises:
            raise RuntimeError("broken")

    frozen = gc.get_freeze_count()
    try:
        compare(run, run, rounds=6)
    except RuntimeError:
        assert raises
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
