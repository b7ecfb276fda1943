"""An accelerator in pure Python: device placement faults found on a machine that has no GPU.

Tensors stay on the CPU with their real values. What was moved to the pretended device is tracked per storage,
questions about devices are answered accordingly, and an operation that mixes places raises what CUDA raises, with the
stray tensor named.
"""

from __future__ import annotations

from lmconform.simulated.accelerator import SimulatedAccelerator, active_accelerator, simulated_accelerator
from lmconform.simulated.splitting import split_layers
from lmconform.simulated.stray import PlacementError, Stray
from lmconform.simulated.tracking import Origin

__all__ = [
    "Origin", "PlacementError", "SimulatedAccelerator", "Stray", "active_accelerator", "simulated_accelerator",
    "split_layers",
]  # fmt: skip
