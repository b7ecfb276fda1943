"""Buffers that a call in train mode changes: batch statistics, the bias that balances experts, tables extended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards every buffer is as it was before, so that the next call in train mode starts where this one did.

    A model may learn in its buffers; what it keeps anywhere else is left as it becomes, and shows. backward() belongs
    within, since it may read what is written back.
    """
    import torch

    before = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, name, buffer, values in before:
                part._buffers[name] = buffer.copy_(values) if buffer.shape == values.shape else values


def outside_the_state(module: nn.Module) -> set[str]:
    """Names of the buffers that state_dict() leaves out."""
    return {name for name, _ in module.named_buffers()} - set(module.state_dict())
