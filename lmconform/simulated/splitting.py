"""A model's layers spread over several devices, as a device map does."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from lmconform.simulated.tracking import tensors_in
from lmconform.structure import called


def split_layers(module: nn.Module, devices: tuple[torch.device, ...]) -> nn.Module:
    """Move `module` in place: everything to the first device, its layers in equal runs over all of them.

    A layer's forward() takes its inputs to where its weights are and brings its outputs back to where they came from,
    so that no line of the model, and no hook on a layer, has to know. With one device this is `module.to(device)`.
    """
    module.to(devices[0])
    layers = layer_list(module)
    if layers is None or len(devices) == 1:
        return module
    for number, layer in enumerate(layers):
        for part in called(layer):
            part.to(devices[number * len(devices) // len(layers)])
            part.__class__ = _elsewhere(type(part))
    return module


_moving: dict[type[nn.Module], type[nn.Module]] = {}


def _elsewhere(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with a forward() that runs where the weights are; a class, so that copies of a layer stay apart."""
    if kind in _moving:
        return _moving[kind]

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = next((parameter.device for parameter in self.parameters()), None)
        came_from = next((tensor.device for tensor in tensors_in([args, kwargs]) if tensor.is_floating_point()), None)
        if own is None or came_from is None or own == came_from:
            return kind.forward(self, *args, **kwargs)
        return _moved(kind.forward(self, *_moved(args, own), **_moved(kwargs, own)), came_from)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _restore, (kind,), self.__dict__

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    _moving[kind] = type(kind.__name__, (kind,), {"forward": forward, "__reduce_ex__": reduce, **names})
    return _moving[kind]


def _restore(kind: type[nn.Module]) -> nn.Module:
    made = _elsewhere(kind)
    return made.__new__(made)


def layer_list(module: nn.Module) -> nn.ModuleList | None:
    """The longest list of modules that is nested in no other: the stack of layers."""
    best: nn.ModuleList | None = None
    best_path = ""
    for path, child in module.named_modules():
        inside = best_path and path.startswith(best_path + ".")
        if isinstance(child, nn.ModuleList) and not inside and len(child) > (len(best) if best is not None else 1):
            best, best_path = child, path
    return best


def _moved(value: Any, place: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(place)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, place) for item in value)
    if type(value) is dict:
        return {name: _moved(item, place) for name, item in value.items()}
    return value
