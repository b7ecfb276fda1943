"""Where a subject runs: cpu, cuda, cuda:1, mps, or pretended: sim (one CUDA device) and sim:2 (two)."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lmconform.simulated import SimulatedAccelerator

SIMULATED = re.compile(r"sim(?::([1-9]\d*))?")


class DeviceError(ValueError):
    """There is no such device; the text says which there are."""


def is_simulated(name: str) -> bool:
    """Whether `name` asks for the simulated accelerator, whose tensors lie in the CPU's memory."""
    return SIMULATED.fullmatch(name) is not None


def lies_in_memory(name: str) -> bool:
    """Whether tensors of that device take ordinary memory."""
    return name == "cpu" or is_simulated(name)


def require(name: str) -> None:
    """Raises DeviceError, once and before anything is built, where there is no such device. The CPU costs nothing."""
    if name != "cpu":
        Device(name)


class Device:
    """A device that is there, by its public name. Raises DeviceError for one that is not.

    `place` is what tensors answer for `.device`. Use its tensors within `active()` only: a simulated device is there
    for that long, and in the next such block finds its tensors where they were.
    """

    def __init__(self, name: str) -> None:
        import torch

        self.name = name
        self.accelerator: SimulatedAccelerator | None = None
        self.place: torch.device
        if is_simulated(name):
            from lmconform.simulated import SimulatedAccelerator, active_accelerator

            match = SIMULATED.fullmatch(name)
            count = int(match[1] or 1) if match else 1
            outer = active_accelerator()
            if outer is not None and len(outer.devices) < count:
                raise DeviceError(f"device {name!r}: {len(outer.devices)} are simulated already around it")
            self.accelerator = outer or SimulatedAccelerator(count)
            self.places = self.accelerator.devices[:count]
            self.place = self.places[0]
            return
        try:
            self.place = torch.device(name)
        except RuntimeError as error:
            text = str(error).partition("\n")[0]
            raise DeviceError(f"device {name!r}: {text}; lmconform adds sim and sim:2") from error
        self.places = (self.place,)
        if self.place.type == "cuda" and not torch.cuda.is_available():
            raise DeviceError(f"device {name!r}: this machine has no CUDA device; use cpu, or sim, which pretends one")
        if self.place.type == "mps" and not torch.backends.mps.is_available():
            raise DeviceError(f"device {name!r}: this machine has no MPS device; use cpu, or sim")

    def active(self) -> AbstractContextManager[Any]:
        """Within, the device is there."""
        return nullcontext() if self.accelerator is None else self.accelerator.active()

    def put(self, module: nn.Module, announce: Callable[[str], None] = lambda text: None) -> nn.Module:
        """`module` moved here, its layers spread where there are several devices."""
        if len(self.places) == 1:
            return module.to(self.place)
        from lmconform.simulated.splitting import layer_list, split_layers

        if layer_list(module) is None:
            announce(f"{self.name}: no list of layers was found to spread; everything is on {self.place}")
        return split_layers(module, self.places)
