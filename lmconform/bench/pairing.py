"""Two tasks in turns: ABBA, BAAB, ... and the ratio of what they took, round by round."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lmconform.bench.clocks import WALL, Clock
from lmconform.bench.intervals import median_interval

ROUNDS = 10


@dataclass(frozen=True)
class Task:
    """`run(*prepare())` is one execution; only `run` is timed."""

    run: Callable[..., object]
    prepare: Callable[[], tuple[Any, ...]] = field(default=tuple)

    def timed(self, clock: Clock) -> float:
        """One execution, in seconds."""
        given = self.prepare()
        return max(clock.seconds(lambda: self.run(*given)), 1e-9)  # processor time ticks coarsely on some systems


@dataclass(frozen=True)
class Comparison:
    """What came of it. `ratio` is subject / peer, below 1 where the subject is faster; [low, high] holds it at `level`.

    `seconds` and `peer_seconds`: every timing, two a round, in the order they were taken.
    """

    ratio: float
    low: float
    high: float
    level: float
    seconds: tuple[float, ...]
    peer_seconds: tuple[float, ...]
    clock: str

    @property
    def median(self) -> float:
        """Seconds of the subject."""
        return statistics.median(self.seconds)

    @property
    def peer_median(self) -> float:
        """Seconds of the peer."""
        return statistics.median(self.peer_seconds)

    def slower_than(self, ratio: float) -> bool:
        """Whether the subject takes more than `ratio` times the peer's time, and chance does not explain it."""
        return self.low > ratio

    def __str__(self) -> str:
        return f"{self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}]"


def compare(
    subject: Task | Callable[[], object],
    peer: Task | Callable[[], object],
    *,
    rounds: int = ROUNDS,
    warmup: int = 1,
    clock: Clock = WALL,
    level: float = 0.95,
) -> Comparison:
    """Time both in turns within this process.

    A round is subject, peer, peer, subject, the next one the other way round, so that a machine that gets slower and
    whatever the first of two runs pays fall on both. Its ratio is the geometric mean of its two. The estimate is the
    median of the rounds' ratios: half of the rounds may be disturbed before it moves. `warmup` runs of each come first
    and are not counted. The garbage collector runs between rounds, not within.

    Raises ValueError for too few rounds (6 for a level of 95 %).
    """
    tasks = [side if isinstance(side, Task) else Task(side) for side in (subject, peer)]
    median_interval([1.0] * rounds, level)  # too few rounds: said before anything is timed
    seconds: tuple[list[float], list[float]] = ([], [])
    ratios = []
    with _collected_between() as collect:
        for _ in range(warmup):
            for task in tasks:
                task.timed(clock)
        for index in range(rounds):
            collect()
            first = index % 2
            for which in (first, 1 - first, 1 - first, first):
                seconds[which].append(tasks[which].timed(clock))
            ratios.append(math.prod(seconds[0][-2:]) / math.prod(seconds[1][-2:]))
    ratio, low, high = (math.sqrt(squared) for squared in median_interval(ratios, level))
    return Comparison(ratio, low, high, level, tuple(seconds[0]), tuple(seconds[1]), clock.name)


@contextmanager
def _collected_between() -> Iterator[Callable[[], object]]:
    """The collector is off but when asked, and then looks at what is new only: all of torch takes it 0.1 s."""
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    gc.disable()
    if not frozen:
        gc.freeze()
    try:
        yield gc.collect
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()
