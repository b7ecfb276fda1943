"""What a run took: wall clock, processor time, or CUDA events."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

Run = Callable[[], object]


class Clock(Protocol):
    """`seconds(run)` calls `run` once and says what it took."""

    name: str

    def seconds(self, run: Run) -> float: ...


class Ticking:
    """A counter of seconds, read before and after."""

    def __init__(self, name: str, now: Callable[[], float]) -> None:
        self.name = name
        self._now = now

    def seconds(self, run: Run) -> float:
        started = self._now()
        run()
        return self._now() - started


WALL = Ticking("wall", time.perf_counter)
PROCESSOR = Ticking("processor", time.process_time)  # of all threads of the process: other processes stay out of it


class CudaEvents:
    """Two events around the run on an idle device: launches that the device waits for count, queued work does not."""

    name = "cuda events"

    def __init__(self, device: Any) -> None:
        import torch

        self._device = device
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, run: Run) -> float:
        import torch

        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            self._start.record()
            run()
            self._end.record()
            torch.cuda.synchronize()
        return self._start.elapsed_time(self._end) / 1000
