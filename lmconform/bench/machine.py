"""The facts of a machine that a timing depends on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from lmconform.session import versions


def facts() -> dict[str, Any]:
    """Processor, cores, threads, load, accelerator and versions, as they are now; JSON-ready. Imports torch."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "load_average": round(psutil.getloadavg()[0], 2),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "versions": versions(),
    }


def _processor() -> str:
    """Its trade name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
