"""The pretended accelerator: its devices, and the context in which it is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lmconform.simulated.mode import PlacementMode, device_constructors
from lmconform.simulated.runtime import pretended_runtime
from lmconform.simulated.tracking import CPU, Ledger

_active: list[SimulatedAccelerator] = []


class SimulatedAccelerator:
    """What `simulated_accelerator` yields.

    `devices` are cuda:0, cuda:1, ...; `place(tensor)` says where a tensor lies, as `tensor.device` does. `computing` is
    where the running operation runs; `unmarked_place` is set while the autograd engine runs, whose operations no mode
    sees: tensors without a mark are its own, and lie there.
    """

    def __init__(self, devices: int = 1) -> None:
        if devices < 1:
            raise ValueError(f"devices={devices}: at least one is needed")
        self.devices = tuple(torch.device("cuda", number) for number in range(devices))
        self.current = 0
        self.ledger = Ledger()
        self.computing = CPU
        self.unmarked_place: torch.device | None = None
        self.mode = PlacementMode(self)

    def resolve(self, device: Any) -> torch.device:
        """The device that a device argument means. Raises what CUDA raises for one that is not there."""
        if isinstance(device, int):
            device = torch.device("cuda", device)
        elif not isinstance(device, torch.device):
            device = torch.device(device)
        if device.type == "cpu":
            return CPU
        if device.type != "cuda":
            return device
        number = self.current if device.index is None else device.index
        if number >= len(self.devices):
            raise RuntimeError(
                f"CUDA error: invalid device ordinal (cuda:{number}, where {len(self.devices)} are simulated)"
            )
        return self.devices[number]

    def place(self, tensor: Tensor) -> torch.device:
        mark = self.ledger.mark(tensor)
        if mark is not None:
            return mark.place
        real = torch._C.TensorBase.device.__get__(tensor)
        if real != CPU:
            return real
        return self.unmarked_place or CPU

    @contextmanager
    def active(self) -> Iterator[SimulatedAccelerator]:
        """Within, this accelerator is there. Its tensors keep their places from one such block to the next."""
        if self in _active:
            yield self
            return
        if _active:
            raise RuntimeError(f"an accelerator of {len(_active[-1].devices)} devices is simulated already")
        device_constructors()  # torch.device contexts within follow the set, and it may have to be mended
        with ExitStack() as stack:
            stack.enter_context(pretended_runtime(self))
            _active.append(self)
            stack.callback(_active.remove, self)
            self.mode.retired = False
            stack.callback(setattr, self.mode, "retired", True)
            if "torch._dynamo" in sys.modules:  # what was compiled outside runs eagerly here
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self.mode)
            yield self

    @contextmanager
    def second_device(self) -> Iterator[torch.device]:
        """Within, the accelerator is there and has a cuda:1, also where only one device was asked for."""
        before = self.devices
        self.devices = tuple(torch.device("cuda", number) for number in range(max(2, len(before))))
        try:
            with self.active():
                yield self.devices[1]
        finally:
            self.devices = before

    @contextmanager
    def unmarked_at(self, place: torch.device) -> Iterator[None]:
        """While the engine runs: its tensors carry no marks, and are taken to lie where they are used.

        `place` is what they answer when asked.
        """
        before = self.unmarked_place
        self.unmarked_place = place
        try:
            yield
        finally:
            self.unmarked_place = before


@contextmanager
def simulated_accelerator(devices: int = 1) -> Iterator[SimulatedAccelerator]:
    """A pretended CUDA with that many devices, for tests on machines without a GPU.

    Within, `.device` answers cuda:0 for what was moved there, torch.cuda is available, and operations that mix places
    raise PlacementError with PyTorch's own text and the stray tensor's name. Values are those of the CPU. Afterwards
    every tensor is on the CPU again, where it always was. Within another one of as many devices it is that one; more
    devices than the outer one has raise RuntimeError.

        import torch
        from torch import nn

        import lmconform

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = nn.Embedding(10, 4)
                self.table = torch.zeros(16, 4)

            def forward(self, ids):
                return self.embedding(ids) + self.table[: ids.shape[1]]

        with lmconform.simulated_accelerator():
            model = Model().to("cuda")
            try:
                model(torch.ones(1, 5, dtype=torch.int64, device="cuda"))
            except lmconform.PlacementError as error:
                print(error.stray)  # the attribute table of Model

    Yields the SimulatedAccelerator; its `devices` are what `split_layers` and device maps spread a model over.
    """
    if _active and len(_active[-1].devices) >= devices:
        yield _active[-1]
        return
    with SimulatedAccelerator(devices).active() as accelerator:
        yield accelerator


def active_accelerator() -> SimulatedAccelerator | None:
    """The accelerator that is simulated now."""
    return _active[-1] if _active else None
