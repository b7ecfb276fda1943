"""Which storage lives on which pretended device, and where it came from."""

from __future__ import annotations

import itertools
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
_serial = itertools.count()
_REMEMBERED = 12  # storages that one was computed from


@dataclass(frozen=True)
class Origin:
    """The call that made a tensor, or that moved it: `call` as in `torch.arange`, and the user's line."""

    call: str
    file: str
    line: int
    function: str
    device_given: bool

    @property
    def place(self) -> str:
        """`torch.arange at modeling.py:12 in forward`."""
        return f"{self.call} at {os.path.basename(self.file)}:{self.line} in {self.function}"

    def __str__(self) -> str:
        return self.place + ("" if self.device_given else ", which names no device")


class Mark:
    """Where a storage is, the call it came from, and the storages that it was computed from, the nearest first.

    Those are held weakly: one that has gone belongs to no module, and could not be named.
    """

    __slots__ = ("origin", "place", "sources")

    def __init__(
        self, place: torch.device, origin: Origin | None = None, sources: tuple[weakref.ref[Any], ...] = ()
    ) -> None:
        self.place = place
        self.origin = origin
        self.sources = sources


class Ledger:
    """Marks of storages. They hang on the storage itself: they live as long, and no address can be reused."""

    def __init__(self) -> None:
        self.key = f"_simulated_place_{next(_serial)}"

    def mark(self, tensor: Tensor) -> Mark | None:
        return getattr(holder(tensor), self.key, None)

    def put(self, tensor: Tensor, mark: Mark) -> None:
        setattr(holder(tensor), self.key, mark)

    def put_fresh(self, value: Any, mark: Mark) -> None:
        """Mark every tensor within `value` whose storage has no mark yet: views and in-place results follow theirs."""
        if isinstance(value, Tensor):
            kept = holder(value)
            if getattr(kept, self.key, None) is None:
                setattr(kept, self.key, mark)
        elif isinstance(value, (tuple, list)):
            for item in value:
                self.put_fresh(item, mark)

    def derived(self, tensors: Iterable[Tensor], origin: Origin | None = None) -> Mark:
        """The mark of what was computed on the CPU from these."""
        near: list[weakref.ref[Any]] = []
        far: list[weakref.ref[Any]] = []
        for tensor in tensors:
            near.append(weakref.ref(holder(tensor)))
            mark = self.mark(tensor)
            if mark is not None:
                far.extend(mark.sources)
                origin = origin or mark.origin
        return Mark(CPU, origin, (*near, *far)[:_REMEMBERED])


def holder(tensor: Tensor) -> Any:
    """The storage of a tensor; the tensor itself where it has none (sparse, nested)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        inner = unwrapped(tensor)
        return tensor if inner is tensor else holder(inner)


def unwrapped(tensor: Tensor) -> Tensor:
    """Without the wrappers of vmap and torch.func."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def call_name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__objclass__", None)
    if owner is not None or getattr(func, "__qualname__", "").startswith(("Tensor.", "TensorBase.")):
        return f"Tensor.{name}"
    module = getattr(func, "__module__", None) or "torch"
    return f"{module if module.startswith('torch') and '._' not in module else 'torch'}.{name}"


_own: dict[CodeType, bool] = {}


def is_library(code: CodeType) -> bool:
    """Whether the code is torch's own, or this package's."""
    known = _own.get(code)
    if known is None:
        known = _own[code] = code.co_filename.startswith((_TORCH, _HERE, "<"))
    return known


def user_frame() -> FrameType | None:
    """The innermost frame of neither torch nor this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_library(frame.f_code):
        frame = frame.f_back
    return frame


def origin_of(func: Any, device_given: bool) -> Origin | None:
    frame = user_frame()
    if frame is None:
        return None
    code = frame.f_code
    return Origin(call_name(func), code.co_filename, frame.f_lineno, code.co_name, device_given)
