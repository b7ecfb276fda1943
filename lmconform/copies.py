"""Copies of a module: in another type, with another's weights, and whether one is a copy at all."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def give_weights(module: nn.Module, source: nn.Module) -> None:
    """The state dict, then every parameter by name: a state_dict() of the model's own may leave some out."""
    import torch

    state = source.state_dict()
    module.load_state_dict({k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in state.items()}, strict=False)
    theirs = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in theirs:
                parameter.copy_(theirs[name].cpu())


def convert(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """module.to(dtype); complex numbers, which would lose their imaginary part, become as precise as that type."""
    import torch

    pairs = {torch.float32: torch.complex64, torch.float64: torch.complex128}

    def converted(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(pairs.get(dtype, tensor.dtype))
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return module._apply(converted)


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same for a module whose weights are of another type; one that was built in that type keeps its buffers."""
    return module if dtype_of(module) == dtype else convert(module, dtype)


def dtype_of(module: nn.Module) -> torch.dtype:
    import torch

    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())


def empty_containers(module: nn.Module) -> dict[int, Any]:
    """A memo for copy.deepcopy() with new empty containers for the empty ones of a module: half of a copy's time.

    Every nn.Module holds a dozen of them, nearly all for hooks, and deepcopy() takes each OrderedDict apart.
    """
    kinds = (OrderedDict, dict, set, list)
    held = (value for each in module.modules() for value in vars(each).values() if type(value) in kinds)
    return {id(value): type(value)() for value in held if not value and not getattr(value, "__dict__", None)}


def shares_memory(copied: nn.Module, module: nn.Module) -> bool:
    """Whether a weight of the copy is the original's: a __deepcopy__ of the model's own gives itself back."""
    here = {parameter.data_ptr() for parameter in module.parameters() if parameter.numel() and not parameter.is_meta}
    return any(parameter.data_ptr() in here for parameter in copied.parameters() if not parameter.is_meta)
