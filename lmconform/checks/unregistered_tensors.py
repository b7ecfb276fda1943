"""gradients.registered: tensors that logits depend on and that no optimizer, device move or checkpoint knows of."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lmconform import structure, tolerance
from lmconform.context import Hint
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

DEPTH = 5  # of containers inside an attribute
WIDEST = 50_000  # objects looked into
TORCH_OWN = ("_parameters", "_buffers", "_modules")


@register_check(
    "gradients.registered",
    holds="every tensor that influences logits is a parameter or a buffer, and none is shared by accident",
    requires=COMPARES_LOGITS,
    profile="smoke",
)
def check_registered(subject: Specimen, ctx: Context) -> None:
    """Attributes of every module are walked, through lists, dicts and objects, also modules in a plain list.

    Each floating tensor found that is neither parameter nor buffer is moved in a copy, to see whether logits move.
    What only repeats a registered tensor's memory (a view) is none. Parameters of different places in one memory must
    be declared: input and output embeddings, or `_tied_weights_keys`.
    """
    check_sharing(subject, ctx)
    copied = subject.copy()
    loose = list(loose_tensors(copied.module))
    if not loose:
        return
    ids = ctx.ids(2, subject.longest(24))
    base = subject.logits(ids)
    bound = tolerance.allowed(subject.noise, base)
    guilty = []
    if moved_by(copied, ids, base, [tensor for _, _, tensor in loose]) > bound:
        guilty = [(name, kind) for name, kind, tensor in loose if moved_by(copied, ids, base, [tensor]) > bound]
    if guilty:
        name, kind = guilty[0]
        rest = f"; {len(guilty) - 1} more: {', '.join(n for n, _ in guilty[1:5])}" if guilty[1:] else ""
        ctx.fail(
            f"logits depend on {name}, which is neither a parameter nor a buffer",
            where=name + rest,
            hint=Hint(
                "modules in a plain list or dict are invisible: use nn.ModuleList or nn.ModuleDict; no optimizer "
                "trains their weights, and neither .to() nor state_dict() sees them",
                "grad.unregistered",
            )
            if kind == "module"
            else Hint(
                "assign it as nn.Parameter if it is trained, else with register_buffer(name, tensor, persistent=...): "
                "as it stands .to(device), state_dict() and the optimizer pass it by",
                "grad.unregistered",
                "device.unregistered_tensor",
            ),
        )
    unused = ", ".join(name for name, _, _ in loose[:3])
    ctx.note(f"plain tensors that move no logit: {unused}{', ...' if len(loose) > 3 else ''}")


def moved_by(copied: Specimen, ids: Tensor, base: Tensor, tensors: list[Tensor]) -> float:
    """The largest change of a logit when these tensors are moved by their own size; they are put back."""
    import torch

    originals = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for index, tensor in enumerate(tensors):
            generator = torch.Generator().manual_seed(index)
            wobble = torch.randn(tensor.shape, generator=generator).to(tensor)
            size = tensor[tensor.isfinite()].float().square().mean().sqrt() if tensor.numel() else tensor.sum()
            tensor.data.add_(wobble * 0.5 * (float(size) or 1.0))
        try:
            logits = copied.logits(ids)
        finally:
            for tensor, original in zip(tensors, originals, strict=True):
                tensor.data.copy_(original)
    change = (logits.double() - base.double()).abs().nan_to_num(nan=float("inf"))
    return float(change.max())


def loose_tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Name, kind (tensor or module) and value of each floating tensor in an attribute that is not registered."""
    registered = {id(t) for t in (*module.parameters(), *module.buffers())}
    memory = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers()) if t.numel()}
    seen: set[int] = {id(part) for part in module.modules()}
    for name, part in module.named_modules():
        for key, value in list(vars(part).items()):
            if key in TORCH_OWN or "hook" in key or value is None:
                continue
            place = f"{name}.{key}" if name else key
            yield from _walk(place, value, registered, memory, seen, DEPTH)


def _walk(
    place: str, value: Any, registered: set[int], memory: set[int], seen: set[int], depth: int
) -> Iterator[tuple[str, str, Tensor]]:
    import torch
    from torch import nn

    if isinstance(value, torch.Tensor):
        own = id(value) in registered or id(value) in seen or value.is_meta
        if own or not value.is_floating_point() or not value.numel():
            return
        seen.add(id(value))
        if value.untyped_storage().data_ptr() not in memory:
            yield place, "module" if isinstance(value, nn.Parameter) else "tensor", value
        return
    if (
        isinstance(value, str | bytes | int | float | bool | type)
        or id(value) in seen
        or depth == 0
        or len(seen) > WIDEST
    ):
        return
    if callable(value) and not isinstance(value, nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        for name, tensor in (*value.named_parameters(), *value.named_buffers()):
            for found, _, loose in _walk(f"{place}.{name}", tensor, registered, memory, seen, depth):
                yield found, "module", loose
        return
    items: list[tuple[Any, Any]]
    if isinstance(value, dict):
        items = [(f"[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"[{index}]", item) for index, item in enumerate(value)]
    elif isinstance(value, set | frozenset):
        items = [("{...}", item) for item in value]
    elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        items = [(f".{key}", item) for key, item in vars(value).items()]
    else:
        return
    for suffix, item in items[:1000]:
        yield from _walk(f"{place}{suffix}", item, registered, memory, seen, depth - 1)


def check_sharing(subject: Specimen, ctx: Context) -> None:
    """Parameters under two names, or in one memory, must be declared."""
    module = subject.module
    places: dict[tuple[int, int], list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.numel() and not parameter.is_meta:
            places.setdefault((parameter.untyped_storage().data_ptr(), int(parameter.storage_offset())), []).append(
                name
            )
    declared = declared_ties(module)
    tables = (structure.embedding(module, subject.vocab_size), structure.head(module, subject.vocab_size))
    ends = {part for table in tables if table is not None for part in table.modules()}
    for names in places.values():
        outside = [
            name for name in names if _owner(module, name) not in ends and not any(_matches(name, t) for t in declared)
        ]
        # of n names for one tensor one is the source; the others are to be declared
        if len(names) > 1 and len(outside) > 1 and not _one_place(subject, outside):
            ctx.fail(
                "parameters in different places are one tensor, and no tie is declared",
                where=f"{' and '.join(outside[:3])}{', ...' if len(outside) > 3 else ''}",
                hint=Hint(
                    "one layer repeated ([Block()] * n, or one object given twice) trains one set of weights: build "
                    "each anew; if it is meant, declare it in the class's _tied_weights_keys",
                    "init.shared_layers",
                ),
            )


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _one_place(subject: Specimen, names: list[str]) -> bool:
    """Whether the names lead to one module that a forward calls once: several paths to it, no layer repeated.

    Where nobody calls it, others read its weights: whatever holds it, if that is one module, is looked at instead.
    """
    paths = [name.rpartition(".")[0] for name in names]
    while all(paths) and len({subject.module.get_submodule(path) for path in paths}) == 1:
        calls: list[int] = []
        held = subject.module.get_submodule(paths[0])
        hook = held.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
        try:
            subject.logits(subject.probe_ids())
        finally:
            hook.remove()
        if calls:
            return len(calls) == 1
        if len({path.rpartition(".")[2] for path in paths}) > 1:
            return False  # two names under one holder: its weights are read in two places
        paths = [path.rpartition(".")[0] for path in paths]
    return False


def declared_ties(module: nn.Module) -> list[str]:
    """Patterns of parameter names that any part of the model declares tied."""
    patterns: list[str] = []
    for name, part in module.named_modules():
        keys = getattr(part, "_tied_weights_keys", None) or ()
        pairs = [*keys, *keys.values()] if isinstance(keys, dict) else list(keys)
        for pattern in pairs:
            for each in pattern if isinstance(pattern, list | tuple) else (pattern,):
                patterns.append(f"{name}.{each}" if name else str(each))
    return patterns


def _matches(name: str, pattern: str) -> bool:
    if name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern):
        return True
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False
