"""How much memory a workload takes beyond the model: in a process of its own on the CPU, by torch's counter on CUDA.

Resident memory is what a machine runs out of, and torch's allocations on the CPU are seen by no Python tracer. Linux
lets a process set the high-water mark of its resident memory back to now; elsewhere there is no figure.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    import torch

SECONDS = 600.0
SELF = Path("/proc/self")
# Large blocks are mapped one by one and given back when freed: else what one workload left would hide the next's need.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "4096"}


@dataclass(frozen=True)
class Order:
    """What the child measures."""

    spec: str
    shape: str
    cells: Sequence[str]
    batch: int
    time: int
    new: int
    dtype: str | None = None
    threads: int = 1
    imports: Sequence[str] = ()
    trust_remote_code: bool = False


def resident_peaks(order: Order) -> dict[str, int]:
    """Bytes by cell, beyond what the process held with the model built and run once on a few tokens.

    Raises Unavailable where the system does not tell, or the child fails.
    """
    if not (SELF / "clear_refs").exists():
        raise Unavailable("peak memory is measured by Linux' /proc/self/clear_refs, which is not here")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "peaks.json"
        environment = {**os.environ, **ALLOCATOR, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "lmconform.bench.memory", json.dumps(asdict(order)), str(answer)],
                env=environment, capture_output=True, text=True, timeout=SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Unavailable(f"measuring the memory of {order.spec} did not end within {SECONDS:g} s") from None
        if not answer.exists():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise Unavailable(f"measuring the memory of {order.spec} failed: {last}")
        peaks: dict[str, int] = json.loads(answer.read_text(encoding="utf-8"))
    return peaks


def allocated_peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch allocated on a CUDA device at most during `run`, beyond what lay there before."""
    import torch

    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def resident_peak(run: Callable[[], object]) -> int:
    """Bytes of resident memory at most during `run`, beyond what this process holds now. Linux only."""
    gc.collect()
    (SELF / "clear_refs").write_text("5", encoding="ascii")
    before = resident()
    run()
    return max(0, _status("VmHWM") - before)


def resident() -> int:
    """Bytes of memory that this process holds now. Linux only."""
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = (SELF / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def _measured(order: Order) -> dict[str, int]:
    import torch

    from lmconform.bench.shapes import shaped_subject
    from lmconform.bench.workloads import WORKLOADS
    from lmconform.loading import import_first

    torch.set_num_threads(order.threads)
    for module in order.imports:
        import_first(module)
    subject = shaped_subject(order.spec, order.shape, trust_remote_code=order.trust_remote_code)
    specimen = subject.open(as_loaded=True, dtype=order.dtype)
    ids, few = specimen.probe_ids(order.batch, order.time), specimen.probe_ids(1, 4)
    peaks = {}
    for cell in order.cells:
        with contextlib.suppress(Unavailable):
            warm, task = (WORKLOADS[cell](specimen, given, new) for given, new in ((few, 2), (ids, order.new)))
            warm.run(*warm.prepare())
            peaks[cell] = resident_peak(lambda task=task: task.run(*task.prepare()))  # type: ignore[misc]
            specimen.module.zero_grad(set_to_none=True)
    return peaks


def _main(arguments: Sequence[str]) -> None:
    given: dict[str, Any] = json.loads(arguments[0])
    Path(arguments[1]).write_text(json.dumps(_measured(Order(**given))), encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1:])
