"""What rounding alone can do to a computation, measured: every operation's result is moved in its last bits.

This is Monte Carlo arithmetic (Parker 1997): another machine, another order of summation or a fused kernel moves each
result by about a unit in the last place, and so does this mode, at random. Backward passes are within its reach, since
the CPU runs them in the calling thread.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

SINGLE = 2.0**-23  # the unit in the last place of float32
HUGE = 1e30  # beyond it lie masks, not results

# Operations that move numbers and compute none: their results are the same on every machine.
EXACT = frozenset((
    "_to_copy", "abs", "alias", "amax", "amin", "arange", "cat", "clamp", "clamp_", "clamp_max", "clamp_min", "clone",
    "constant_pad_nd", "copy", "copy_", "embedding", "empty", "empty_like", "expand", "fill", "fill_", "flip", "full",
    "full_like", "gather", "index", "index_put", "index_put_", "index_select", "lift", "lift_fresh", "lift_fresh_copy",
    "masked_fill", "masked_fill_", "masked_scatter", "max", "maximum", "min", "minimum", "neg", "new_empty", "new_full",
    "new_ones", "new_zeros", "ones", "ones_like", "relu", "relu_", "repeat", "roll", "round", "scalar_tensor",
    "scatter", "scatter_", "select_scatter", "sign", "slice_scatter", "sort", "split_with_sizes_copy", "stack",
    "threshold_backward", "to", "topk", "tril", "tril_", "triu", "triu_", "where", "zero", "zero_", "zeros",
    "zeros_like",
))  # fmt: skip


def last_bits(seed: int, unit: float | None = None) -> AbstractContextManager[Any]:
    """Within, every floating result is moved by up to `unit` of its size (None: the unit of its own dtype).

    Whole numbers stay: they are counts, positions and masks, which every machine computes exactly.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    generator = torch.Generator().manual_seed(seed)

    def move(result: Any) -> None:
        if isinstance(result, tuple | list):
            for item in result:
                move(item)
        elif isinstance(result, torch.Tensor) and result.device.type == "cpu" and result.numel():
            if result.is_complex():
                result = torch.view_as_real(result)
            if result.is_floating_point() and not result.is_inference():
                _wobble(result, torch.finfo(result.dtype).eps if unit is None else unit, generator)

    class LastBits(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:  # skipping it means importing it, for seconds; nothing is compiled here
            return False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if _computes(func):
                move(result)
            return result

    return LastBits()


@functools.cache
def _computes(func: Any) -> bool:
    """Whether the operation computes its result, rather than copying or giving a view of what was there."""
    written = all(made.alias_info is None or made.alias_info.is_write for made in func._schema.returns)
    return written and func.namespace == "aten" and func.overloadpacket.__name__ not in EXACT


def _wobble(values: Tensor, unit: float, generator: Any) -> None:
    """Move numbers in place; sums lose bits against their terms, so what is small beside its row moves with the row."""
    import torch

    plain = values.round() != values
    size = values.abs()
    if bool((size >= HUGE).any()):
        plain &= size < HUGE
        size = torch.where(plain, size, 0)
    if size.dim():
        size = size.maximum(torch.linalg.vector_norm(size, dim=-1, keepdim=True) / size.shape[-1] ** 0.5)
    noise = torch.empty_like(values, memory_format=torch.contiguous_format).uniform_(-unit, unit, generator=generator)
    values.copy_(torch.where(plain, noise.mul_(size).add_(values), values))


def wobble_buffers(module: nn.Module, seed: int) -> None:
    """Move floating buffers by a unit in float32's last place: rotary rates and the like came out of float32 pow()."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for buffer in module.buffers():
            if buffer.is_floating_point() and buffer.device.type == "cpu" and buffer.numel():
                away = (torch.rand(buffer.shape, generator=generator, dtype=torch.float64) * 2 - 1) * SINGLE
                plain = (buffer.abs() < HUGE) & (buffer != buffer.round())
                buffer.copy_(torch.where(plain, buffer * (1 + away).to(buffer.dtype), buffer))
