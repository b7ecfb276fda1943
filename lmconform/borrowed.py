"""Copies of a large model that borrow its weights: they are changed layer by layer, as a forward reaches them.

A float64 copy of a checkpoint of 8 billion bfloat16 weights would take 64 GB beside its 16; borrowed, it takes what one
layer takes in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lmconform import structure

if TYPE_CHECKING:
    from torch import Tensor, nn

Change = Callable[[str, "Tensor"], "Tensor"]  # a parameter's name and values; gives new values, leaves the old


def borrowed(module: nn.Module, change: Change | None = None) -> nn.Module:
    """A copy of `module` with modules, attributes, buffers and gradients of its own, in the memory of its weights.

    Change none of them in place. With `change` it computes with `change(name, weight)` in the place of each weight, and
    no gradient reaches them; a weight that is read while the layer that holds it does not run is seen as it is. Raises
    what copy.deepcopy raises, and TypeError where a __deepcopy__ of the model's own gives back the model.
    """
    from torch import nn

    shared: dict[int, Any] = {}
    for weight in module.parameters():
        if type(weight) is nn.Parameter:
            shared[id(weight)] = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad and change is None)
            vars(shared[id(weight)]).update(vars(weight))
    theirs = {id(weight) for weight in module.parameters()}
    made = copy.deepcopy(module, dict(shared))
    if any(id(weight) in theirs for weight in made.parameters()):
        raise TypeError(f"a copy of {type(module).__name__} holds the parameters of the model itself")
    if change is not None:
        for part, held in _lent_together(made):
            _Loan(held, change).watch(part)
    return made


class _Loan:
    """The weights that are changed while one part runs. A class, so that a copy of the model copies it, too."""

    def __init__(self, held: list[tuple[nn.Module, str, str]], change: Change) -> None:
        self.held = held  # module, attribute, name in the whole model
        self.change = change
        self.calls = 0  # a part may be called within its own call
        self.kept: list[Any] = []

    def watch(self, part: nn.Module) -> None:
        part.register_forward_pre_hook(self.begin)
        hooks = part._forward_pre_hooks
        for key, hook in list(hooks.items()):
            if not isinstance(getattr(hook, "__self__", None), _Loan):  # it may derive weights from what is lent
                hooks[key] = hooks.pop(key)  # to the end
        # before those that stand there: of two loans the later one ends first
        part.register_forward_hook(self.end, prepend=True, always_call=True)

    def begin(self, part: nn.Module, inputs: Any) -> None:
        self.calls += 1
        if self.calls > 1:
            return
        self.kept = [module._parameters[key] for module, key, _ in self.held]
        try:
            for (module, key, name), weight in zip(self.held, self.kept):
                slots: dict[str, Any] = module._parameters  # a plain tensor will do
                slots[key] = self.change(name, weight)
        except BaseException:
            self.give_back()
            raise

    def end(self, part: nn.Module, inputs: Any, output: Any) -> None:
        if self.calls > 1:
            self.calls -= 1
        else:  # 0: a hook before `begin` raised
            self.give_back()

    def give_back(self) -> None:
        for (module, key, _), weight in zip(self.held, self.kept):
            module._parameters[key] = weight
        self.calls, self.kept = 0, []


def _lent_together(module: nn.Module) -> Iterator[tuple[nn.Module, list[tuple[nn.Module, str, str]]]]:
    """The parts that borrow as a whole (layers, and what holds weights outside of them), and the weights of each."""
    names = {id(weight): name for name, weight in module.named_parameters()}
    found = structure.blocks(module)
    called = [part for block in (found[1] if found is not None else ()) for part in structure.called(block)]
    layers = list({id(part): part for part in called}.values())  # a block may stand in the list several times
    inside = {id(part) for layer in layers for part in layer.modules()}
    for part in [*layers, *(part for part in module.modules() if id(part) not in inside)]:
        held = [
            (one, key, names[id(weight)])
            for one in (part.modules() if id(part) in inside else [part])
            for key, weight in one._parameters.items()
            if weight is not None
        ]
        if held:
            yield part, held
