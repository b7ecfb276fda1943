"""What one block of a model does: its input caught, the other blocks taken out of the way. Nothing is registered here.

A causal stack sees order without positions from its second block on (Haviv et al. 2022), so positions can be judged
on one block alone only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lmconform import structure, tolerance
from lmconform.specimen import Specimen

if TYPE_CHECKING:
    from torch import Tensor, nn


class _Caught(BaseException):
    """Stops a forward at the first block. No Exception, so that no model swallows it."""


_found: WeakKeyDictionary[Specimen, list[nn.Module] | str] = WeakKeyDictionary()


class _Entries:
    """Tells a block's first part from its later ones, forward after forward; of one that is called itself, the call."""

    def __init__(self) -> None:
        self._block: int | None = None
        self._seen: set[nn.Module] = set()

    def enters(self, block: int, part: nn.Module) -> bool:
        """Whether this call of a part enters its block: the one before was another block's, or the round is over."""
        anew = block != self._block or part in self._seen
        if anew:
            self._block, self._seen = block, set()
        self._seen.add(part)
        return anew


def blocks(subject: Specimen) -> list[nn.Module] | str:
    """The repeated blocks that a forward on token ids calls, in order; or, in words, why there are none.

    A composite model has several stacks (a vision tower): the one that takes part counts. Only whole blocks count:
    where all of them hand their input on, no token may feel another.
    """
    if subject not in _found:
        _found[subject] = _find(subject)
    return _found[subject]


def _find(subject: Specimen) -> list[nn.Module] | str:
    from torch import nn

    named = structure.blocks(subject.module)
    if named is None:
        return "no list of blocks was found"
    candidates = [named[1]]
    candidates += [
        part
        for part in subject.module.modules()
        if isinstance(part, nn.ModuleList) and len(part) > 0 and part is not named[1] and None not in list(part)
        and len({type(child) for child in part}) == 1
    ]  # fmt: skip
    called: list[list[int]] = [[] for _ in candidates]

    def kept(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, index: int, block: nn.Module
    ) -> None:
        """A block gives back what is as wide as what it was given; one head of an attention does not."""
        found = _hidden(args, kwargs)
        first = output[0] if isinstance(output, tuple | list) and output else output
        if found is not None and getattr(first, "shape", found[1].shape) != found[1].shape:
            return
        if module is block or called[index][-1:] != [id(block)]:  # the parts of a list count once
            called[index].append(id(block))

    hooks = [
        part.register_forward_hook(functools.partial(kept, index=index, block=block), with_kwargs=True)
        for index, stack in enumerate(candidates)
        for block in stack
        for part in structure.called(block)
    ]
    try:
        subject.logits(subject.probe_ids(1, 4))
    finally:
        for hook in hooks:
            hook.remove()
    for stack, order in zip(candidates, called, strict=True):
        if order == [id(block) for block in stack] and _whole(subject, list(stack)):
            return list(stack)
    return "no list of whole blocks was found that a forward calls once each, in order"


def _whole(subject: Specimen, stack: list[nn.Module]) -> bool:
    ids = subject.probe_ids(2, 6)
    ids[1, 1:] = ids[0, 1:]
    ids[1, 0] = next(token for token in subject.ordinary_ids if token != int(ids[0, 0]))
    with alone(stack, None):
        logits = subject.logits(ids)
    return float((logits[0, 1:] - logits[1, 1:]).abs().max()) <= tolerance.allowed(subject.noise, logits)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | int, Tensor] | None:
    """Where in a block's arguments its input is: the first floating [batch, time, ...] tensor, and that tensor."""
    import torch

    arguments: list[tuple[str | int, Any]] = [*enumerate(args), *sorted(kwargs.items(), key=_hidden_first)]
    for place, value in arguments:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3:
            return place, value
    return None


def _hidden_first(item: tuple[str, Any]) -> bool:
    return item[0] not in ("hidden_states", "x", "hidden", "inputs", "input")


def block_input(subject: Specimen, input_ids: Tensor, **inputs: Any) -> Tensor | None:
    """What the first block receives for these ids, [batch, time, width]; nothing after it is computed.

    Blocks may take [time, batch, width]. None where no blocks are found or their input cannot be told; with as many
    rows as tokens it cannot.
    """
    import torch

    stack = blocks(subject)
    if isinstance(stack, str):
        return None
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = _hidden(args, kwargs)
        if found is not None:
            with torch._C.DisableTorchFunctionSubclass():  # a subclass may not know what is done with it later
                caught.append(found[1].detach().clone())
        raise _Caught

    hooks = [part.register_forward_pre_hook(catch, with_kwargs=True) for part in structure.called(stack[0])]
    try:
        subject.logits(input_ids, **inputs)
    except _Caught:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    batch, time = input_ids.shape
    if not caught:
        return None
    if caught[0].shape[:2] == (time, batch) and (batch != time or batch == 1):  # sequence first
        return caught[0].transpose(0, 1)
    return caught[0] if caught[0].shape[:2] == (batch, time) and batch != time else None


def constant_inputs(subject: Specimen, time: int) -> Tensor | None:
    """What the first block receives for one token repeated `time` times: [time, width].

    Rows that differ carry an absolute position encoding. None as for `block_input`.
    """
    ids = subject.probe_ids(1, 1).expand(1, time).contiguous()
    received = block_input(subject, ids)
    return None if received is None else received[0].flatten(1)


@contextmanager
def alone(stack: list[nn.Module], index: int | None = 0) -> Iterator[list[Tensor]]:
    """Within it, every block but `index` (None: every block) hands its input on unchanged.

    Yields a list that each forward appends block `index`'s input to, as a leaf that takes a gradient where gradients
    are on.
    """
    inputs: list[Tensor] = []
    entries = _Entries()
    given: dict[int, tuple[Tensor, Tensor]] = {}  # by block: what it was given, and what stands for that within it

    def enter(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], place: int
    ) -> tuple[Any, dict[str, Any]] | None:
        import torch

        if entries.enters(place, module):
            given.pop(place, None)
            found = _hidden(args, kwargs)
            if found is not None:
                given[place] = found[1], found[1]
                if place == index and torch.is_grad_enabled():
                    given[place] = found[1], found[1].detach().clone().requires_grad_(True)
                    inputs.append(given[place][1])
        if place not in given:
            return None
        own, leaf = given[place]  # a list's later parts may be given it too, as the residual is
        return tuple(leaf if v is own else v for v in args), {k: leaf if v is own else v for k, v in kwargs.items()}

    def pass_on(module: nn.Module, args: tuple[Any, ...], output: Any, place: int) -> Any:
        import torch

        if place not in given:
            return None
        own = given[place][0]
        if isinstance(output, torch.Tensor):
            return own if output.shape == own.shape else None
        if isinstance(output, tuple | list) and output and getattr(output[0], "shape", None) == own.shape:
            make = getattr(type(output), "_make", type(output))  # named tuples take their fields one by one
            try:
                return make((own, *output[1:]))
            except TypeError:  # a tuple of a class of its own
                return (own, *output[1:])
        return None

    parts = [(i, part) for i, block in enumerate(stack) for part in structure.called(block)]
    hooks = [part.register_forward_pre_hook(functools.partial(enter, place=i), with_kwargs=True) for i, part in parts]
    hooks += [part.register_forward_hook(functools.partial(pass_on, place=i)) for i, part in parts if i != index]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
