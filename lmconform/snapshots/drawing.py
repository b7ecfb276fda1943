"""Weights for a fingerprint: drawn by lmconform, so that neither the machine's random stream nor initialisation matter.

A snapshot keeps how each parameter was drawn (a Slot). Later the same slots are dealt out again: by name, and where
names are gone by shape and order of use, so that renaming and reordering change no number.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lmconform import excitation
from lmconform.snapshots import counting

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from lmconform.specimen import Specimen

# Factors of the quiet draw: hidden states so small that a norm's epsilon is felt, and a block's own share in them still
# large enough to show it. A norm behind the embedding would enlarge the stream again; matrices stand two in a row.
_MATRIX = math.sqrt(0.1)  # sqrt is exact to the last bit on every machine, pow is not
QUIET = {"embedding": 0.1, "norm": 0.1, "bias": 0.1, "linear": _MATRIX, "conv1d": _MATRIX, "stacked": _MATRIX}


@dataclass(frozen=True)
class Slot:
    """One parameter: all its names (tied ones share a slot), and the rule that draws it.

    `rule` is a role of lmconform.excitation, "stacked" (experts), "near" (a constant that moves a little), "spread"
    (drawn at random by the builder), "own" (the builder's own values, moved a little) or "kept" (no floating numbers).
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    rule: str
    centre: float = 0.0
    scale: float = 0.0

    def values(self, stream: int, own: NDArray[np.float64]) -> NDArray[np.float64]:
        """The numbers, exact in float32; `own` are the parameter's present ones."""
        noise = counting.normals(stream, own.size).reshape(own.shape)
        if self.rule in ("norm", "near", "own"):
            noise = noise.clip(-2, 2)
        drawn = coarse(own) * (1 + self.scale * noise) if self.rule == "own" else self.centre + self.scale * noise
        return drawn.astype(np.float32).astype(np.float64)

    def to_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names), "shape": list(self.shape), "rule": self.rule, "centre": self.centre,
            "scale": self.scale,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Slot:
        return cls(tuple(data["names"]), tuple(data["shape"]), data["rule"], data["centre"], data["scale"])


def coarse(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rounded to 14 bits: log() and exp() in float32 differ from machine to machine in bit 24."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 2**14) / 2**14, exponent)


def parameters(module: nn.Module) -> dict[tuple[str, ...], Tensor]:
    """Every parameter once, under all its names, in the order of registration."""
    names: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    tensors: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        place = parameter.data_ptr() if parameter.numel() else id(parameter)
        key = (place, tuple(parameter.shape))
        names.setdefault(key, []).append(name)
        tensors.setdefault(key, parameter)
    return {tuple(names[key]): tensors[key] for key in names}


def by_use(module: nn.Module, run: Callable[[], object]) -> list[tuple[str, ...]]:
    """The parameters' names in the order in which `run` first uses them; unused ones last, as registered."""
    import torch
    from torch.overrides import TorchFunctionMode

    known = parameters(module)
    places = {tensor.data_ptr(): names for names, tensor in known.items() if tensor.numel()}
    order: dict[tuple[str, ...], None] = {}

    def note(value: Any) -> None:
        if isinstance(value, torch.nn.Parameter):
            names = places.get(value.data_ptr())
            if names is not None:
                order.setdefault(names)
        elif isinstance(value, tuple | list):
            for item in value:
                note(item)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            made = func(*args, **kwargs)
            if not isinstance(made, torch.Size | torch.dtype | torch.device | int):  # asking for a size is no use
                note([*args, *kwargs.values()])
            return made

    with Watch():
        run()
    return [*order, *(names for names in known if names not in order)]


def make_slots(subject: Specimen, run: Callable[[], object]) -> list[Slot]:
    """The slots of a subject's parameters in order of use, from their roles and from how its builder starts them."""
    roles = excitation.roles_of(subject.module)
    known = parameters(subject.module)
    again = dict(subject.builder(subject.seed + 1).named_parameters()) if subject.builder is not None else {}
    return [
        slot_for(names, known[names], roles.get(id(known[names]), ""), again.get(names[0]))
        for names in by_use(subject.module, run)
    ]


def slot_for(names: tuple[str, ...], parameter: Tensor, role: str, again: Tensor | None) -> Slot:
    """How to draw one parameter. `again` is the same one built under another seed."""
    shape = tuple(parameter.shape)
    if not parameter.is_floating_point() or not parameter.numel():
        return Slot(names, shape, "kept")
    values = _numbers(parameter)
    if role == "embedding":
        return Slot(names, shape, role, 0.0, excitation.EMBEDDING_RMS)
    if role in ("linear", "conv1d"):
        fan_in = max(shape[-1] if role == "linear" else shape[0], 1)
        return Slot(names, shape, role, 0.0, float(excitation.MATRIX_GAIN / np.sqrt(fan_in)))
    if role == "bias":
        return Slot(names, shape, role, 0.0, excitation.BIAS_RMS)
    middle = float(coarse(np.array(np.median(values))))
    if role == "norm":
        return Slot(names, shape, role, middle, excitation.NORM_JITTER)
    if bool((values == values.flat[0]).all()):
        return Slot(names, shape, "near", middle, 0.1 * abs(middle) or 0.1)
    random = again is not None and again.shape == parameter.shape and not np.array_equal(values, _numbers(again))
    if not random:
        return Slot(names, shape, "own", 0.0, 0.1)
    if len(shape) >= 3:  # experts side by side, [experts, out, in] either way round
        return Slot(names, shape, "stacked", 0.0, float(1 / np.sqrt(min(shape[-2:]))))
    return Slot(names, shape, "spread", float(coarse(np.array(values.mean()))), float(coarse(np.array(values.std()))))


def _numbers(parameter: Tensor) -> NDArray[np.float64]:
    import torch

    return np.asarray(parameter.detach().to("cpu", torch.float64).numpy())


# -- dealing out -------------------------------------------------------------------------------------------------------


@dataclass
class Deal:
    """Which slot each parameter gets. `slots[i]` of the snapshot went to `holders[i]`, None where none fits."""

    slots: list[Slot]
    holders: list[tuple[str, ...] | None]
    renamed: list[tuple[str, str]] = field(default_factory=list)
    split: list[tuple[tuple[str, ...], int]] = field(default_factory=list)  # once tied to slot i, now on their own
    added: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every slot has a parameter and every parameter a slot."""
        return None not in self.holders and not self.added


def deal(slots: list[Slot], module: nn.Module, order: list[tuple[str, ...]]) -> Deal:
    """Match slots to parameters: by name and shape, then by shape and order of use among what is left over."""
    known = parameters(module)
    slot_of = {name: index for index, slot in enumerate(slots) for name in slot.names}
    made = Deal(slots, [None] * len(slots))
    left: list[tuple[str, ...]] = []
    for names in order:
        index = next((slot_of[n] for n in names if n in slot_of), None)
        if index is None or slots[index].shape != tuple(known[names].shape):
            left.append(names)
        elif made.holders[index] is None:
            made.holders[index] = names
        else:
            made.split.append((names, index))
    waiting: dict[tuple[int, ...], list[int]] = defaultdict(list)
    coming: dict[tuple[int, ...], list[tuple[str, ...]]] = defaultdict(list)
    for index, slot in enumerate(slots):
        if made.holders[index] is None:
            waiting[slot.shape].append(index)
    for names in left:
        coming[tuple(known[names].shape)].append(names)
    for shape, newcomers in coming.items():
        if len(waiting[shape]) != len(newcomers):  # which is which cannot be told
            made.added += newcomers
            continue
        for index, names in zip(waiting[shape], newcomers, strict=True):
            made.holders[index] = names
            made.renamed.append((slots[index].names[0], names[0]))
    return made


def draw(module: nn.Module, made: Deal, seed: int, *, quiet: bool, as_loaded: bool = False) -> None:
    """Set every parameter in place. `as_loaded` keeps the values they have, but for the quiet factor."""
    known = parameters(module)
    for index, (slot, names) in enumerate(zip(made.slots, made.holders, strict=True)):
        if names is not None:
            _fill(known[names], slot, counting.stream("weights", seed, index), quiet, as_loaded)
    for names, index in made.split:
        _fill(known[names], made.slots[index], counting.stream("weights", seed, index), quiet, as_loaded)
    roles = excitation.roles_of(module) if made.added else {}
    for names in made.added:
        slot = slot_for(names, known[names], roles.get(id(known[names]), ""), None)
        _fill(known[names], slot, counting.stream("weights", seed, names[0]), quiet, as_loaded)


def _fill(parameter: Tensor, slot: Slot, stream: int, quiet: bool, as_loaded: bool) -> None:
    import torch

    if slot.rule == "kept" or parameter.is_meta:
        return
    own = _numbers(parameter)
    values = own if as_loaded else slot.values(stream, own)
    if quiet:
        values = values * QUIET.get(slot.rule, 1.0)
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.array(values)))
