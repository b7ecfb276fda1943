"""What PyTorch does not say: which attribute of which module is in the wrong place, or which call made the tensor."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmconform.simulated.tracking import CPU, Origin, holder, is_library

if TYPE_CHECKING:
    from lmconform.simulated.accelerator import SimulatedAccelerator

_DEPTH = 3  # how far into lists, dicts and plain objects a tensor is looked for


@dataclass(frozen=True)
class Stray:
    """The tensor that is not where the model is.

    `name` is its dotted name from the outermost module on (`layers.0.attention.table`), or the variable's name; `kind`
    is parameter, buffer, attribute, variable or global; `module` the class that holds it (for a variable the function,
    for a global the Python module); `derived` says that the operand was computed from it, `unlisted` that it belongs to
    a module which stands in a plain list or dict.
    """

    name: str
    kind: str
    module: str
    place: str
    derived: bool = False
    unlisted: bool = False

    def __str__(self) -> str:
        what = {
            "parameter": f"the parameter {self.name} of {self.module}",
            "buffer": f"the buffer {self.name} of {self.module}",
            "attribute": f"the attribute {self.name} of {self.module}",
            "variable": f"the variable {self.name} of {self.module}",
            "global": f"the global variable {self.name} of {self.module}",
        }[self.kind]
        return f"computed from {what}" if self.derived else what


class PlacementError(RuntimeError):
    """An operation whose operands lie on devices that CUDA does not mix.

    The text begins with PyTorch's own. `operation` is the aten operation, `devices` all places in play, `stray` what is
    in the wrong place and `origin` the call that made it or moved it, each None where it could not be found.
    """

    def __init__(
        self,
        text: str,
        *,
        operation: str | None = None,
        devices: tuple[str, ...] = (),
        stray: Stray | None = None,
        origin: Origin | None = None,
    ) -> None:
        super().__init__(text)
        self.operation = operation
        self.devices = devices
        self.stray = stray
        self.origin = origin

    @property
    def sentence(self) -> str:
        """What PyTorch does not say."""
        return str(self).partition("\n")[2]

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: getattr(self, name) for name in ("operation", "devices", "stray", "origin")}
        return (type(self), self.args, state)


def placement_error(
    text: str,
    func: Any,
    operands: list[tuple[str, bool, Tensor, torch.device]],
    accelerator: SimulatedAccelerator,
) -> PlacementError:
    """The error for these operands, with the stray among them named."""
    frames = [frame for frame in _frames() if not is_library(frame.f_code)]
    roots = _roots()
    home = _home(roots, accelerator)
    places = list(dict.fromkeys(place for *_, place in operands))
    if home is None or home not in places:
        home = next((place for place in places if place != CPU), CPU)
    stray: Stray | None = None
    origin: Origin | None = None
    place = next(place for place in places if place != home)
    for _, _, tensor, where in operands:
        if where == home:
            continue
        found, made = _trace(tensor, where, roots, frames, accelerator)
        if stray is None or (found is not None and stray.kind == "variable" and found.kind != "variable"):
            stray, origin, place = found or stray, made or origin, where
    return PlacementError(
        f"{text}\n{_sentence(stray, origin, place, home, _running(roots))}",
        operation=str(func),
        devices=tuple(map(str, places)),
        stray=stray,
        origin=origin,
    )


def _sentence(stray: Stray | None, origin: Origin | None, place: torch.device, home: torch.device, running: str) -> str:
    subject = f"The tensor on {place} is {stray}" if stray else f"The tensor on {place} has no name that could be found"
    if stray and stray.unlisted:
        subject += (
            ", in a plain list or dict of modules, which .to(device) never meets: use nn.ModuleList or ModuleDict"
        )
    elif stray and stray.kind == "attribute":
        subject += ", neither parameter nor buffer, so .to(device) leaves it behind: register it as a buffer"
    elif stray and stray.kind in ("parameter", "buffer"):
        subject += f", while the model is on {home}: made or replaced after the move, or never moved"
    elif stray and stray.kind == "global":
        subject += ", which .to(device) cannot move: register it as a buffer"
    if origin:
        kept = stray is not None and stray.kind in ("attribute", "global")  # no device= would have helped
        subject += f"; it comes from {origin.place if kept else origin}"
    if running and (stray is None or stray.kind in ("variable", "global")):
        subject += f"; it is met in {running}"
    return subject + "."


def _running(roots: list[nn.Module]) -> str:
    """The innermost module that runs, named from the outermost: `blocks.1.attention (Attention)`."""
    if not roots:
        return ""
    kind = type(roots[-1]).__name__
    path = next((path for path, module in roots[0].named_modules() if module is roots[-1]), "")
    return f"{path} ({kind})" if path else kind


def _trace(
    tensor: Tensor,
    place: torch.device,
    roots: list[nn.Module],
    frames: list[FrameType],
    accelerator: SimulatedAccelerator,
) -> tuple[Stray | None, Origin | None]:
    mark = accelerator.ledger.mark(tensor)
    origin = mark.origin if mark else None
    own = holder(tensor)
    variable: Stray | None = None
    alive = [storage for source in (mark.sources if mark else ()) if (storage := source()) is not None]
    for storage in dict.fromkeys((own, *alive)):
        derived = storage is not own
        for root, unlisted in [(root, unlisted) for root in roots for unlisted in (False, True)]:
            found = _in_modules(root, storage, unlisted)
            if found:
                return Stray(*found, str(place), derived, unlisted), origin
        found = _in_globals(frames, storage)
        if found:
            return Stray(*found, str(place), derived), origin
        if variable is None:
            found = _in_variables(frames, storage)
            variable = Stray(*found, str(place), derived) if found else None
    return variable, origin


def _in_modules(root: nn.Module, storage: Any, unlisted: bool) -> tuple[str, str, str] | None:
    """Name, kind and holder; `unlisted` looks into modules that stand in plain lists and dicts, too."""
    for path, module in root.named_modules():
        held = vars(module)
        for kind, name, value in _held(held):
            for suffix, tensor in _walk(value, _DEPTH, set(), unlisted):
                if holder(tensor) is storage:
                    dotted = f"{path}.{name}{suffix}" if path else f"{name}{suffix}"
                    return dotted, kind, type(module).__name__
    return None


def _held(attributes: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name, value in attributes.get("_parameters", {}).items():
        yield "parameter", name, value
    for name, value in attributes.get("_buffers", {}).items():
        yield "buffer", name, value
    for name, value in attributes.items():
        if name not in ("_parameters", "_buffers", "_modules"):
            yield "attribute", name, value


def _walk(value: Any, depth: int, seen: set[int], unlisted: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Tensors within a value, each with the rest of its name: ('[0]', t), ('.keys', t)."""
    if isinstance(value, Tensor):
        yield "", value
        return
    if unlisted and isinstance(value, nn.Module):
        yield from ((f".{name}", tensor) for name, tensor in (*value.named_parameters(), *value.named_buffers()))
    if depth == 0 or id(value) in seen or isinstance(value, (str, bytes, int, float, type, nn.Module)):
        return
    seen.add(id(value))
    items: Iterator[tuple[str, Any]]
    if isinstance(value, dict):
        items = ((f"[{key!r}]", item) for key, item in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = ((f"[{number}]", item) for number, item in enumerate(value))
    elif hasattr(value, "__dict__") and not callable(value):
        items = ((f".{key}", item) for key, item in list(vars(value).items()))
    else:
        return
    for name, item in items:
        for suffix, tensor in _walk(item, depth - 1, seen, unlisted):
            yield f"{name}{suffix}", tensor


def _in_globals(frames: list[FrameType], storage: Any) -> tuple[str, str, str] | None:
    for namespace in {id(frame.f_globals): frame.f_globals for frame in frames if _in_forward(frame)}.values():
        for name, value in list(namespace.items()):
            if isinstance(value, (Tensor, list, tuple, dict)) and not name.startswith("__"):
                for suffix, tensor in _walk(value, 2, set()):
                    if holder(tensor) is storage:
                        return f"{name}{suffix}", "global", str(namespace.get("__name__"))
    return None


def _in_forward(frame: FrameType) -> bool:
    """A module's method, or a function that one called: not the test or script around it."""
    outer: FrameType | None = frame
    while outer is not None:
        if isinstance(outer.f_locals.get("self"), nn.Module):
            return True
        outer = outer.f_back
    return False


def _in_variables(frames: list[FrameType], storage: Any) -> tuple[str, str, str] | None:
    """A local variable; of several frames the outermost that is still within a module, where the tensor came in."""
    last = None
    for frame in frames:
        if last is not None and not _in_forward(frame):
            break
        for name, value in frame.f_locals.items():
            if isinstance(value, Tensor) and holder(value) is storage:
                owner = frame.f_locals.get("self")
                function = frame.f_code.co_name
                if isinstance(owner, nn.Module):
                    function = f"{type(owner).__name__}.{function}"
                last = name, "variable", f"{function} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
                break
    return last


def _home(roots: list[nn.Module], accelerator: SimulatedAccelerator) -> torch.device | None:
    """Where most of the weights are."""
    counted: Counter[torch.device] = Counter()
    for root in roots[:1]:
        for parameter in root.parameters():
            counted[accelerator.place(parameter)] += parameter.numel()
    return counted.most_common(1)[0][0] if counted else None


def _roots() -> list[nn.Module]:
    """The modules whose methods are running, outermost first: their names are the longest."""
    found: dict[int, nn.Module] = {}
    for frame in _frames():
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found[id(owner)] = owner
    return list(found.values())[::-1]


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
