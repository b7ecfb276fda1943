"""CUDA's rules for operations whose operands lie on different devices, one aten operation at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmconform.simulated.stray import placement_error
from lmconform.simulated.tracking import CPU, Mark, tensors_in

if TYPE_CHECKING:
    from lmconform.simulated.accelerator import SimulatedAccelerator

# Any mixture is legal: copies between places, and operations that look at sizes only.
_FREE = frozenset({
    "copy", "copy_", "_to_copy", "_copy_from", "_copy_from_and_resize", "bernoulli_", "expand_as", "view_as",
    "reshape_as", "resize_as_", "is_same_size", "is_set_to", "set_", "_has_same_storage_numel", "_pack_padded_sequence",
    "_pad_packed_sequence", "to", "type_as", "as_strided_scatter", "lift_fresh", "_fused_adam_", "_fused_adamw_",
    "_fused_sgd_", "_fused_adagrad_",
})  # fmt: skip
# Lengths and batch sizes are read by the host: these arguments stay on the CPU.
_HOST_ARGUMENTS = frozenset({"batch_sizes", "lengths", "input_lengths", "target_lengths", "tensor_indices_or_sections"})
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu", "_cudnn_rnn", "_pad_packed_sequence", "_ctc_loss",
                        "_cudnn_ctc_loss", "_use_cudnn_ctc_loss", "ctc_loss", "tensor_split"})  # fmt: skip
_INDEXING = frozenset({
    "index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put",
})  # fmt: skip
# Not tagged pointwise, yet built on TensorIterator or reading a zero-dimensional operand on the host.
_TAKES_CPU_SCALARS = frozenset({
    "fill", "fill_", "masked_fill", "masked_fill_", "index_fill", "index_fill_", "linspace", "logspace", "rsub",
    "__and__", "__or__", "__xor__", "__iand__", "__ior__", "__ixor__", "__lshift__", "__rshift__", "__ilshift__",
    "__irshift__", "eq_", "ne_", "lt_", "le_", "gt_", "ge_", "copysign_", "heaviside_", "floor_divide", "floor_divide_",
    "true_divide_", "special_xlogy", "slice", "narrow", "select", "split", "unsafe_split", "randint_like", "mse_loss",
    "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "dist", "isin",
    "_amp_foreach_non_finite_check_and_unscale_", "fake_quantize_per_tensor_affine", "normal", "lerp", "lerp_",
})  # fmt: skip
# The kernel that CUDA's own implementation reaches first, where it is another than the operation's.
_KERNELS = {
    "embedding": ("wrapper_CUDA__index_select", {"weight": "self", "indices": "index"}),
    "native_layer_norm": ("wrapper_CUDA__native_layer_norm", {}),
    "mv": ("wrapper_CUDA_mv", {}),
}
_STRUCTURED = frozenset({
    "mm", "bmm", "addmm", "baddbmm", "addmv", "cat", "gather", "scatter", "scatter_add", "index_add", "index_copy",
    "nll_loss_forward", "scatter_reduce", "topk", "cumsum",
})  # fmt: skip


class PlacementRules(TorchDispatchMode):
    """Runs one call whose operands differ in place. `home` is where tensors made inside it come to lie."""

    def __init__(self, accelerator: SimulatedAccelerator, home: torch.device) -> None:
        super().__init__()
        self.accelerator = accelerator
        self.home = home

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operands = list(_operands(func, args, kwargs))
        ledger = self.accelerator.ledger
        if any(tensor.device.type != "cpu" for _, _, tensor in operands):  # meta tensors: PyTorch judges itself
            return func(*args, **kwargs)
        placed = [(name, out, tensor, self.accelerator.place(tensor)) for name, out, tensor in operands]
        place = check(func, placed, self.accelerator)
        result = func(*args, **kwargs)
        ledger.put_fresh(result, Mark(place or self.home))
        return result


Operand = tuple[str, bool, Tensor, torch.device]


def check(func: Any, operands: list[Operand], accelerator: SimulatedAccelerator) -> torch.device | None:
    """Where the result lies. Raises PlacementError where CUDA would refuse; None without tensor operands."""
    places = {place for *_, place in operands}
    if len(places) <= 1:
        return next(iter(places), None)
    name = func._schema.name.partition("::")[2]
    if name in _FREE:
        return operands[0][3]
    if name.startswith("_foreach"):
        return _check_lists(func, operands, accelerator)
    if name in _RECURRENT:
        operands = [operand for operand in operands if operand[0] not in _HOST_ARGUMENTS]
    if name in _INDEXING:
        return _check_indexing(func, name, operands, accelerator)
    if torch.Tag.pointwise in func.tags or name.removesuffix("_") in _TAKES_CPU_SCALARS or name in _TAKES_CPU_SCALARS:
        return _check_iterated(func, operands, accelerator)
    return _check_strict(func, name, operands, accelerator)


def _check_iterated(func: Any, operands: list[Operand], accelerator: SimulatedAccelerator) -> torch.device:
    """TensorIterator: a zero-dimensional CPU tensor goes with anything, as long as it is not written."""
    common = next((place for *_, place in operands if place.type != "cpu"), CPU)
    for _, out, tensor, place in operands:
        if place != common and (place.type != "cpu" or tensor.dim() or out):
            raise placement_error(_two_devices(common, place), func, operands, accelerator)
    return common


def _check_indexing(func: Any, name: str, operands: list[Operand], accelerator: SimulatedAccelerator) -> torch.device:
    """Indices may lie on the CPU; values must lie with what they are put into, unless they are one number."""
    place = operands[0][3]
    for argument, _, tensor, other in operands[1:]:
        if other == place:
            continue
        if argument.startswith("indices"):
            if other.type != "cpu":
                text = f"indices should be either on cpu or on the same device as the indexed tensor ({place})"
                raise placement_error(text, func, operands, accelerator)
        elif other.type != "cpu" or tensor.dim():
            raise placement_error(_two_devices(*_accelerator_first(place, other)), func, operands, accelerator)
    return place


def _check_lists(func: Any, operands: list[Operand], accelerator: SimulatedAccelerator) -> torch.device:
    """Lists are taken element by element, each on its own device."""
    columns: dict[str, list[Operand]] = {}
    singles = []
    for name, out, tensor, place in operands:
        base, bracket, number = name.partition("[")
        if bracket:
            columns.setdefault(number, []).append((base, out, tensor, place))
        else:
            singles.append((name, out, tensor, place))
    for row in columns.values():
        _check_iterated(func, [*row, *singles], accelerator)
    return operands[0][3]


def _check_strict(func: Any, name: str, operands: list[Operand], accelerator: SimulatedAccelerator) -> torch.device:
    """The check that is generated for most kernels: all operands on the first one's device, whatever their size."""
    common = operands[0][3]
    kernel, arguments = _KERNELS.get(name, (_kernel(func, name), {}))
    for argument, _, _, place in operands[1:]:
        if place != common:
            argument = argument.partition("[")[0]
            text = (
                f"Expected all tensors to be on the same device, but got {arguments.get(argument, argument)} is on "
                f"{place}, different from other tensors on {common} (when checking argument in method {kernel})"
            )
            raise placement_error(text, func, operands, accelerator)
    return common


def _kernel(func: Any, name: str) -> str:
    overload = func._schema.overload_name
    if name.removesuffix("_") in _STRUCTURED:
        return f"wrapper_CUDA_{name}"
    return f"wrapper_CUDA_{overload.replace('.', '_')}_{name}"


def _two_devices(first: torch.device, second: torch.device) -> str:
    return f"Expected all tensors to be on the same device, but found at least two devices, {first} and {second}!"


def _accelerator_first(first: torch.device, second: torch.device) -> tuple[torch.device, torch.device]:
    return (first, second) if first.type != "cpu" else (second, first)


def _operands(func: Any, args: tuple, kwargs: dict) -> Iterator[tuple[str, bool, Tensor]]:
    """Every tensor operand: its argument's name (with [n] in a list), whether it is written, the tensor."""
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        out = argument.alias_info is not None and argument.alias_info.is_write
        if isinstance(value, Tensor):
            yield argument.name, out, value
        elif isinstance(value, (tuple, list)):
            for number, item in enumerate(value):
                for tensor in tensors_in(item):
                    yield f"{argument.name}[{number}]", out, tensor
