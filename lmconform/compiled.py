"""A model that comes compiled, as it was written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

NOTE = "compiled by torch.compile: the module is checked as it was written, and compiled by placement.compile"


def as_written(module: nn.Module, announce: Callable[[str], None] | None = None) -> nn.Module:
    """The module without torch.compile: out of its wrapper, and in place for the parts that are compiled.

    Code that was compiled for a device, a type or a mode of autograd runs where checks change these; and a wrapper
    hides the signature of forward().
    """
    found = _unwrapped(module)
    compiled = found is not module
    for parent in list(found.modules()):
        for name, child in list(parent._modules.items()):  # named_children() passes by what stands there twice
            if child is not None and (inner := _unwrapped(child)) is not child:
                setattr(parent, name, inner)
                compiled = True
    for part in found.modules():
        if getattr(part, "_compiled_call_impl", None) is not None:  # of module.compile()
            part._compiled_call_impl = None
            compiled = True
    if compiled and announce is not None:
        announce(NOTE)
    return found


def _unwrapped(module: nn.Module) -> nn.Module:
    frames = sys.modules.get("torch._dynamo.eval_frame")  # where the wrapper is made: importing it takes half a second
    wrapper = getattr(frames, "OptimizedModule", ())
    while isinstance(module, wrapper):
        module = module._orig_mod
    return module
