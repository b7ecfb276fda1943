"""A step that is run many times over: its tensor operations recorded once, and run again without the model's Python.

What is recorded are the operations below autograd and vmap, on fixed buffers: the caller writes new values into the
same tensors and runs the recording again. What does not depend on these buffers (masks, tables of rotations) is
computed once, views of them are made once, and what is left is a straight line of calls. The operations and their order
are the model's own, so the results are too, bit for bit; `record` refuses a step for which that cannot be known.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Step = Callable[[], "tuple[Tensor, list[Tensor]]"]  # losses [members], gradients [members, ...]


class Unrecordable(Exception):
    """The step decides by values, draws at random, or writes to what outlives it."""


@dataclass(frozen=True)
class Operation:
    """One call as it happened. Tensors are kept alive, so that no address stands for two of them."""

    function: Any
    inputs: list[Tensor]
    outputs: list[Tensor]
    written: list[Tensor]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Any

    @property
    def is_view(self) -> bool:
        """Whether it only looks at the memory of its inputs."""
        here = {place_of(tensor) for tensor in self.inputs}
        return not self.written and bool(self.outputs) and all(place_of(tensor) in here for tensor in self.outputs)


def place_of(tensor: Tensor) -> int:
    """The memory that a tensor looks at."""
    return tensor.untyped_storage()._cdata


def record(step: Step, buffers: Sequence[Tensor], into: Sequence[Tensor]) -> tuple[Any, Callable[[], Tensor]]:
    """Run the step; its result, and a function that runs it again and writes the gradients into `into`.

    `buffers` are all tensors whose values change from run to run; `into` [members, ...] takes one gradient each, and
    the function returns the losses. Raises Unrecordable.
    """
    operations, result = _watched(step)
    return result, _Line(operations, buffers).compiled(result[0], result[1], into)


def _watched(step: Step) -> tuple[list[Operation], Any]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    operations: list[Operation] = []

    def tensors(tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            given = zip(func._schema.arguments, args, strict=False)
            written = [each for argument, each in given if argument.alias_info and argument.alias_info.is_write]
            written += [
                (kwargs or {})[argument.name]
                for argument in func._schema.arguments
                if argument.name in (kwargs or {}) and argument.alias_info and argument.alias_info.is_write
            ]
            operations.append(
                Operation(
                    func, tensors((args, kwargs)), tensors(result), tensors(written), args, kwargs or {}, result
                )
            )  # fmt: skip
            return result

    with torch.autograd.set_multithreading_enabled(False), Watching():  # backward is to be seen too
        result = step()
    return operations, result


class _Line:
    """The operations that must be run again, as source text with its constants."""

    def __init__(self, operations: Sequence[Operation], buffers: Sequence[Tensor]) -> None:
        self.operations = operations
        self.fixed = {place_of(buffer) for buffer in buffers}
        self.changing = self._changing()
        self._refuse()
        self.constants: list[Any] = []
        self.lines: list[_Call] = []
        self.names: dict[Hashable, str] = {}  # of a tensor, as its memory, shape and strides
        self.bases: dict[int, tuple[str, Tensor]] = {}
        self.bound = _bound()

    def _changing(self) -> set[int]:
        """All memory whose content depends on the buffers."""
        changing = set(self.fixed)
        before = -1
        while before != len(changing):  # what is written to later was changing from the start
            before = len(changing)
            for operation in self.operations:
                if any(place_of(tensor) in changing for tensor in operation.inputs):
                    changing.update(place_of(tensor) for tensor in (*operation.outputs, *operation.written))
        return changing

    def _refuse(self) -> None:
        """Raise Unrecordable where running the same operations again would not be running the step again."""
        import torch

        made: set[int] = set()
        read: set[int] = set()  # constants that changing operations have read
        for operation in self.operations:
            inputs = {place_of(tensor) for tensor in operation.inputs}
            here = inputs | {place_of(tensor) for tensor in operation.outputs}
            name = operation.function
            if torch.Tag.nondeterministic_seeded in operation.function.tags:
                raise Unrecordable(f"{name} draws at random")
            made |= {place_of(tensor) for tensor in operation.outputs} - inputs
            for tensor in operation.written:
                if place_of(tensor) not in made:
                    raise Unrecordable(f"{name} writes to a tensor that outlives the step")
                if place_of(tensor) in read:
                    raise Unrecordable(f"{name} changes what was read before")
            if not here & self.changing:
                continue
            read |= inputs - self.changing
            if not operation.outputs or torch.Tag.dynamic_output_shape in operation.function.tags:
                raise Unrecordable(f"{name} decides by values")
        if strange := self.changing - made - self.fixed:
            raise Unrecordable(f"{len(strange)} tensors of unknown origin take part")

    # -- text --------------------------------------------------------------------------------------------------------

    def compiled(self, losses: Tensor, gradients: Sequence[Tensor], into: Sequence[Tensor]) -> Callable[[], Tensor]:
        import torch

        direct = self._direct(gradients, into, losses)
        for operation in self.operations:
            here = {place_of(tensor) for tensor in (*operation.inputs, *operation.outputs)}
            if not here & self.changing:
                continue
            if operation.is_view:
                for tensor in operation.outputs:
                    self._view(operation, tensor)
            else:
                self._emit(operation, direct)
        for gradient, place in zip(gradients, into, strict=True):
            if place_of(gradient) not in direct:
                self._call(torch.ops.aten.copy_.default, (place, gradient), {}, [])
        self._call(None, (losses,), {}, [])
        return self._made()

    def _direct(self, gradients: Sequence[Tensor], into: Sequence[Tensor], losses: Tensor) -> dict[int, Tensor]:
        """By memory of a gradient that a bmm makes and nothing else reads: the part of `into` it can write to."""
        import torch

        read = {place_of(losses)}
        makers: dict[int, Operation] = {}
        for operation in self.operations:
            if not operation.is_view:
                read.update(place_of(tensor) for tensor in operation.inputs)
            if operation.function is torch.ops.aten.bmm.default:
                makers[place_of(operation.result)] = operation
        found: dict[int, Tensor] = {}
        twice = {place_of(gradient) for gradient in gradients}
        for gradient, place in zip(gradients, into, strict=True):
            here = place_of(gradient)
            if here not in makers or here in read or here not in twice:
                continue
            twice.discard(here)
            made = makers[here].result
            alike = gradient.stride()[1:] == place.stride()[1:] and gradient.numel() == made.numel()
            whole = made.is_contiguous() and gradient.stride(0) == made.stride(0) == made[0].numel()
            if alike and whole and gradient.storage_offset() == made.storage_offset():
                found[here] = place.as_strided(
                    made.shape, (place.stride(0), *made.stride()[1:]), place.storage_offset()
                )
        return found

    def _view(self, operation: Operation, tensor: Tensor) -> None:
        """A view is made once where the memory stays, and else once each run, straight from what it looks at."""
        import torch

        key = _seen_as(tensor)
        if key in self.names or place_of(tensor) in self.fixed:
            return
        base, first = self.bases[place_of(tensor)]
        if not base:  # a gradient that is written where it belongs
            return
        plain = first.dtype == tensor.dtype and not (first.is_complex() or tensor.is_neg())
        if plain:
            arguments = (first, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
            self.names[key] = self._call(torch.ops.aten.as_strided.default, arguments, {}, [tensor])
        elif operation.result is tensor:
            self.names[key] = self._call(operation.function, operation.arguments, operation.keywords, [tensor])
        else:
            raise Unrecordable(f"{operation.function} gives several views of another type")

    def _emit(self, operation: Operation, direct: dict[int, Tensor]) -> None:
        import torch

        result = operation.result
        if operation.function is torch.ops.aten.bmm.default and place_of(result) in direct:
            self._call(torch.ops.aten.bmm.out, operation.arguments, {"out": direct[place_of(result)]}, [])
            self.bases[place_of(result)] = "", result
            return
        name = self._call(operation.function, operation.arguments, operation.keywords, operation.outputs)
        whole = isinstance(result, torch.Tensor)
        written = {place_of(tensor) for tensor in operation.written}
        for index, tensor in enumerate([result] if whole else result):
            if not isinstance(tensor, torch.Tensor) or place_of(tensor) in written:
                continue
            named = name if whole else f"{name}[{index}]"
            self.names[_seen_as(tensor)] = named
            self.bases[place_of(tensor)] = named, tensor

    def _call(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], makes: list[Tensor]) -> str:
        name = f"v{len(self.lines)}"
        function = self.bound.get(function, function)
        used: list[str] = []
        given = [self._argument(value, used) for value in arguments]
        given += [f"{key}={self._argument(value, used)}" for key, value in keywords.items()]
        called = "" if function is None else self._constant(function)
        self.lines.append(_Call(name, called, given, used, keeps=bool(makes)))
        return name

    def _argument(self, value: Any, used: list[str]) -> str:
        import torch

        if isinstance(value, torch.Tensor):
            if place_of(value) not in self.changing or place_of(value) in self.fixed:
                return self._constant(value)
            named = self.names.get(_seen_as(value))
            if named is None:
                raise Unrecordable("a tensor of unknown origin takes part")
            used.append(named.partition("[")[0])
            return named
        if isinstance(value, list | tuple) and any(isinstance(each, torch.Tensor) for each in value):
            return "[" + ", ".join(self._argument(each, used) for each in value) + "]"
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        self.constants.append(value.detach() if hasattr(value, "detach") else value)
        return f"c{len(self.constants) - 1}"

    def _made(self) -> Callable[[], Tensor]:
        """The calls as one Python function. Its text consists of numbered names alone; all values are bound to them."""
        last: dict[str, int] = {}
        for index, call in enumerate(self.lines):
            last.update(dict.fromkeys((call.name, *call.used), index))
        text = []
        for index, call in enumerate(self.lines):
            if not call.function:
                text.append(f"  return {call.given[0]}")
                continue
            text.append(f"  {call.name} = {call.function}({', '.join(call.given)})")
            text += [f"  {name} = None" for name in dict.fromkeys((*call.used, call.name)) if last[name] == index]
        names = [f"c{index}" for index in range(len(self.constants))]
        head = f"def make(constants):\n ({', '.join(names)},) = constants\n def run():\n"
        space: dict[str, Any] = {}
        exec(head + "\n".join(text) + "\n return run\n", space)
        run = space["make"](self.constants)

        def again() -> Tensor:
            import torch

            with torch.no_grad():
                losses: Tensor = run()
            return losses

        return again


@dataclass
class _Call:
    name: str
    function: str  # empty: what is returned
    given: list[str]
    used: list[str] = field(default_factory=list)
    keeps: bool = True


def _bound() -> dict[Any, Any]:
    """For the commonest operations torch's own functions: the same kernels, called 1 to 2 microseconds sooner."""
    import torch

    aten = torch.ops.aten
    return {
        aten.add.Tensor: torch.add,
        aten.as_strided.default: torch.as_strided,
        aten.bmm.default: torch.bmm,
        aten.bmm.out: torch.bmm,
        aten.clone.default: torch.clone,
        aten.mul.Scalar: torch.mul,
        aten.mul.Tensor: torch.mul,
        aten.pow.Tensor_Scalar: torch.pow,
        aten.sum.dim_IntList: torch.sum,
    }


def _seen_as(tensor: Tensor) -> Hashable:
    return place_of(tensor), tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset(), tensor.dtype
