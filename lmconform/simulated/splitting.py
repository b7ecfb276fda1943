"""A model's layers spread over several devices, as a device map does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def split_layers(module: nn.Module, devices: tuple[torch.device, ...]) -> nn.Module:
    """Move `module` in place: everything to the first device, its layers in equal runs over all of them.

    Hooks bring each layer's inputs to the layer and its outputs back to the first device, so that no line of the model
    has to know. With one device this is `module.to(device)`.
    """
    module.to(devices[0])
    layers = layer_list(module)
    if layers is None or len(devices) == 1:
        return module
    for number, layer in enumerate(layers):
        place = devices[number * len(devices) // len(layers)]
        layer.to(place)
        layer.register_forward_pre_hook(_bring_to(place), with_kwargs=True, prepend=True)
        layer.register_forward_hook(_bring_back(devices[0]))
    return module


def layer_list(module: nn.Module) -> nn.ModuleList | None:
    """The longest list of modules that is nested in no other: the stack of layers."""
    best: nn.ModuleList | None = None
    best_path = ""
    for path, child in module.named_modules():
        inside = best_path and path.startswith(best_path + ".")
        if isinstance(child, nn.ModuleList) and not inside and len(child) > (len(best) if best is not None else 1):
            best, best_path = child, path
    return best


def _bring_to(place: torch.device) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return _moved(args, place), _moved(kwargs, place)

    return hook


def _bring_back(place: torch.device) -> Any:
    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        return _moved(output, place)

    return hook


def _moved(value: Any, place: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(place)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, place) for item in value)
    if type(value) is dict:
        return {name: _moved(item, place) for name, item in value.items()}
    return value
