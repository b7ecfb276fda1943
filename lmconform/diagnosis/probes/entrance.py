"""The operation through which a later token first reaches an earlier position, found by running two texts."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from lmconform.measuring import traces
from lmconform.measuring.attending import SDPA
from lmconform.measuring.lines import called, own_frame
from lmconform.measuring.multihead import call_through

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.specimen import Specimen

FIRST = 3  # the positions before may be padding
LARGEST = 1 << 20  # entries of a tensor without time that is kept
WEIGHT = -1  # instead of the step that made a value: it is made of weights alone
SAMPLE = 1 << 12  # entries of it that are compared
SLACK = 1e-4  # of the largest entry
ATTENTION = {"softmax", SDPA}
PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}
NORMS = {"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm", "normalize"}
SUBTRACTIONS = {"sub", "isub", "subtract"}  # without the underscores of Tensor.__sub__ and Tensor.sub_
DIVISIONS = {"div", "truediv", "itruediv", "divide", "true_divide"}
MULTIPLICATIONS = {"mul", "rmul", "imul", "multiply"}
ROOM = 0.1  # of a statistic: for the epsilon of a norm and for half precision
VIEWS = {"view", "reshape", "flatten", "unflatten"}


class Kind(StrEnum):
    """What kind of operation it is."""

    attention = "attention"  # it has to do with scores or weights of [time, time]
    queries = "queries"  # a softmax of those over the queries
    hidden_late = "hidden_late"  # a softmax of those that sums over later keys, whose weights are then set to 0
    norm = "norm"
    statistic = "statistic"  # the mean over time is taken away, or the size over time divides: a norm written out
    order = "order"  # a view takes entries for those of other positions
    mixing = "mixing"  # a pool, a convolution, a recurrence, a shift: anything else


@dataclass(frozen=True)
class Entrance:
    """`place`: the innermost module that was running, "" for the model itself; `call`: Tensor.mean (model.py:9)."""

    kind: Kind
    place: str
    call: str
    used: str = ""  # the call that brings what was made of later tokens to earlier positions, where it is another

    def __str__(self) -> str:
        what = f"{self.call}, brought to earlier positions by {self.used}" if self.used else self.call
        return f"{self.place}: {what}" if self.place else what


@dataclass
class _Step:
    """One call of torch's, with its tensors [..., time, ...] cut to the positions compared."""

    number: int
    name: str
    call: str
    place: str
    visit: tuple[Any, ...]  # which call of a module: the names that lead to it, and the how manyth call each is
    shapes: tuple[tuple[int, ...], ...]  # of all that went in and came out
    along: str  # of a softmax: "queries", the first of two axes of time, or "time", the only one
    axes: tuple[tuple[int, int], ...]  # of the first tensor with time that went in, and that came out: how many, which
    pairwise: tuple[bool, bool]  # whether a tensor [..., time, time, ...] went in, and came out
    future_hidden: bool  # all that went in of [..., time, time] is 0, or very low, for later keys
    inputs: list[Tensor]
    outputs: list[Tensor]
    without_time: list[Tensor]  # that came out
    sources: list[int]  # the steps that made what went in without time
    normalises: bool  # what goes in is centred or scaled by its own mean or size over time
    told: bool  # something without time went in that no step has made, and that is no weight


def find_entrance(
    subject: Specimen, time: int, runs: Sequence[Callable[[], object]], place: str = ""
) -> Entrance | None:
    """The first operation whose result differs at earlier positions though all that goes in agrees there.

    `runs` are two: each runs the subject on [1, time] tokens, the later half of them others. The module `place` is
    looked through first, and the whole model where it is not there or was told something from outside. None where no
    operation of torch's is seen to be the one: a kernel of another library, say.
    """
    found = None
    for within in dict.fromkeys((place, "")):
        first, second = (_steps(subject, time, run, within) for run in runs)
        index, pairs = _first(first, second)
        if index is not None:
            step = _over_blocks(index, first) or first[_origin(index, pairs)]
            used = first[index].call if step.number < index else ""
            used = used if used.partition(" ")[2] != step.call.partition(" ")[2] else ""  # on another line
            kind = Kind.statistic if first[index].normalises else _kind(step, first)
            found = Entrance(kind, step.place, step.call, used)
            if not step.told:
                break
    return found


def _first(first: Sequence[_Step], second: Sequence[_Step]) -> tuple[int | None, dict[int, tuple[_Step, _Step]]]:
    theirs: dict[tuple[Any, ...], list[_Step]] = {}
    for step in second:
        theirs.setdefault(step.visit, []).append(step)
    following = {visit: iter(steps) for visit, steps in theirs.items()}
    pairs: dict[int, tuple[_Step, _Step]] = {}
    for index, left in enumerate(first):
        right = next(following.get(left.visit, iter(())), None)
        if right is None or (left.call, left.shapes) != (right.call, right.shapes):
            following[left.visit] = iter(())  # values decide what is done: from here on this call is not the same
            continue
        pairs[index] = left, right
        if _differ(left.outputs, right.outputs) and not _differ(left.inputs, right.inputs):
            return index, pairs
    return None, pairs


def _over_blocks(index: int, steps: Sequence[_Step]) -> _Step | None:
    """The attention that the step puts together again: over blocks of a text, where no axis is as long as the text."""
    step = steps[index]
    before = [each for each in steps[:index] if each.name in ATTENTION and each.place == step.place]
    return before[-1] if before and not step.inputs and not before[-1].inputs else None


def _origin(index: int, pairs: Mapping[int, tuple[_Step, _Step]]) -> int:
    """Where a value without time brings the later tokens in: the step that pooled them into it."""
    for source in pairs[index][0].sources:
        if source in pairs and _differ(pairs[source][0].without_time, pairs[source][1].without_time):
            return _origin(source, pairs)
    return index


def _kind(step: _Step, steps: Sequence[_Step]) -> Kind:
    after = steps[step.number + 1 :]
    if step.along == "queries" and step.future_hidden:
        return Kind.queries
    if any(step.pairwise) or (step.name in ATTENTION and step.along != "time"):
        weighing = next((each for each in after if each.name in PRODUCTS and each.pairwise == (True, False)), None)
        late = weighing is not None and weighing.future_hidden and _within(step.place, weighing.place)
        return Kind.hidden_late if late and step.name != SDPA else Kind.attention
    if step.name in NORMS:
        return Kind.norm
    if step.name in VIEWS and len(set(step.axes)) == 2:
        return Kind.order
    return Kind.mixing


def _steps(subject: Specimen, time: int, run: Callable[[], object], within: str) -> list[_Step]:
    """Every call of torch's while `run` runs the subject, in order, those within that module alone."""
    import torch
    from torch.overrides import TorchFunctionMode

    from lmconform.simulated.tracking import tensors_in

    running: list[tuple[str, tuple[Any, ...]]] = [("", ())]
    visits: Counter[tuple[Any, ...]] = Counter()
    made: list[_Step] = []
    makers: dict[int, tuple[int, weakref.ref[Tensor]]] = {}  # the tensor too: its id may be another's by now

    def values(found: Any) -> list[Tensor]:
        return [each.detach() for each in tensors_in(found) if _comparable(each)]

    def maker(tensor: Tensor) -> int | None:
        number, kept = makers.get(id(tensor), (None, None))
        return number if kept is not None and kept() is tensor else None

    def is_weight(tensor: Tensor) -> bool:
        return isinstance(tensor, torch.nn.Parameter) or maker(tensor) == WEIGHT

    class Recording(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if not _within(running[-1][0], within):
                return call_through(self, func, args, kwargs)
            with torch._C.DisableTorchFunctionSubclass():  # what looks at tensors is no call of the model's
                given = [each for each in values((args, kwargs)) if time in each.shape]
                inputs = [_early(each, time) for each in given]  # before the call: it may be in place
                hidden = all(_future_hidden(each, time) for each in given if _pairwise(each, time))
                others = [each for each in tensors_in((args, kwargs)) if _comparable(each) and time not in each.shape]
                sources = [number for each in others if (number := maker(each)) not in (None, WEIGHT)]
                told = any(not is_weight(each) for each in others if maker(each) is None)
                normalises = any(not is_weight(each) for each in others) and _by_own_statistic(func, args, time)
                alike = all(is_weight(each) for each in tensors_in((args, kwargs)))
            result = call_through(self, func, args, kwargs)
            with torch._C.DisableTorchFunctionSubclass():
                results = args[:1] if result is None else result  # x[...] = y gives nothing back
                timed = [each for each in values(results) if time in each.shape]
                alone = [each for each in values(results) if time not in each.shape and each.numel() <= LARGEST]
                if not timed and not alone:
                    return result
                if alike and not timed:  # BitNet's quantised weights, say: no token has a part in them
                    makers.update((id(each), (WEIGHT, weakref.ref(each))) for each in tensors_in(results))
                    return result
                for each in tensors_in(results):
                    if _comparable(each) and time not in each.shape and each.numel() <= LARGEST:
                        makers[id(each)] = len(made), weakref.ref(each)
                name = getattr(func, "__name__", "")
                made.append(
                    _Step(
                        len(made),
                        name,
                        called(func, own_frame(__file__)),
                        running[-1][0],
                        running[-1][1],
                        tuple(tuple(each.shape) for each in (*given, *others, *values(results))),
                        _softmax_along(args, kwargs, time) if name == "softmax" else "",
                        tuple((each[0].dim(), each[0].shape.index(time)) for each in (given, timed) if each),
                        (any(_pairwise(each, time) for each in given), any(_pairwise(each, time) for each in timed)),
                        hidden,
                        inputs,
                        [_early(each, time) for each in timed],
                        [_sample(each) for each in alone],
                        sources,
                        normalises,
                        told,
                    )
                )
                return result

    def enters(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            key = (*running[-1][1], name)
            visits[key] += 1
            running.append((name, (*key, visits[key])))

        return hook

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    named = [(name, part) for name, part in subject.module.named_modules() if name]
    with (
        traces.hooked(*(part.register_forward_pre_hook(enters(name)) for name, part in named)),
        traces.hooked(*(part.register_forward_hook(leaves, always_call=True) for _, part in named)),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        Recording(),
    ):
        torch.manual_seed(0)  # noise of train mode is the same both times
        run()
    return made


@contextmanager
def straightened(enters: Entrance, time: int) -> Iterator[None]:
    """Within it, that view keeps each of [1, time] tokens' entries together: the transpose that is missing is made."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Straightening(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = call_through(self, func, args, kwargs or {})
            if getattr(func, "__name__", "") not in VIEWS or called(func, own_frame(__file__)) != enters.call:
                return made
            given = next((each for each in args if isinstance(each, torch.Tensor)), None)
            if given is None or given.shape.count(time) != 1 or made.shape.count(time) != 1:
                return made
            before, after = given.shape.index(time), made.shape.index(time)
            if given.dim() > made.dim():
                return given.movedim(before, after).reshape(made.shape)
            return given.reshape(made.movedim(after, before).shape).movedim(before, after)

    with Straightening():
        yield


def _comparable(tensor: Tensor) -> bool:
    import torch

    numbers = (tensor.is_floating_point() and tensor.dtype.itemsize > 1) or tensor.is_complex()  # none of float8
    return numbers and tensor.layout == torch.strided and not tensor.is_nested


def _early(tensor: Tensor, time: int) -> Tensor:
    """The positions before the middle, along each axis of time."""
    for axis, size in enumerate(tensor.shape):
        if size == time:
            tensor = tensor.narrow(axis, FIRST, time // 2 - FIRST)
    return tensor.clone()


def _sample(tensor: Tensor) -> Tensor:
    """Some of its entries: where later tokens enter a value without time, they enter nearly all of it."""
    flat = tensor.reshape(-1)
    return flat[:: 1 + flat.numel() // SAMPLE].clone()


def _pairwise(tensor: Tensor, time: int) -> bool:
    return tuple(tensor.shape).count(time) == 2


def _future_hidden(tensor: Tensor, time: int) -> bool:
    query, key = (axis for axis, size in enumerate(tensor.shape) if size == time)
    across = tensor.movedim((query, key), (-2, -1))
    later = across[..., across.new_ones(time, time).triu(1).bool()]
    return bool(((later == 0) | (later.real < traces.MASKED)).all())


def _softmax_along(args: Any, kwargs: Any, time: int) -> str:
    values = args[0] if args else kwargs["input"]
    axis = kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None
    if axis is None or values.shape[axis] != time:
        return ""
    if not _pairwise(values, time):
        return "time"
    return "queries" if axis % values.dim() == values.shape.index(time) else ""


def _by_own_statistic(func: Any, operands: Sequence[Any], time: int) -> bool:
    """Whether its mean over time is taken from a tensor, or it is divided by its size over time.

    The operands' values say so, not how the statistic was computed. `x - x.mean(1, keepdim=True)`, `x / x.std(...)`,
    `x / x.norm(...)`, `x * x.square().mean(...).rsqrt()`; time may be one of several axes that it is taken over.
    """
    import torch

    operation = getattr(func, "__name__", "").strip("_")
    if operation not in SUBTRACTIONS | DIVISIONS | MULTIPLICATIONS or len(operands) < 2:
        return False
    x, statistic = operands[:2]
    if operation in MULTIPLICATIONS and isinstance(x, torch.Tensor) and time not in x.shape:
        x, statistic = statistic, x
    if not all(isinstance(each, torch.Tensor) and each.is_floating_point() for each in (x, statistic)):
        return False
    if tuple(x.shape).count(time) != 1 or time in statistic.shape or statistic.dim() > x.dim():
        return False
    x, statistic = x.detach().double(), statistic.detach().double()
    kept = (1,) * (x.dim() - statistic.dim()) + tuple(statistic.shape)
    axes = [axis for axis, (size, own) in enumerate(zip(kept, x.shape)) if size == 1 and own > 1]
    if x.shape.index(time) not in axes:
        return False
    if operation in SUBTRACTIONS:
        mean = x.mean(axes, keepdim=True)
        return float((statistic - mean).abs().max()) < ROOM * float(mean.abs().max())
    size = statistic.reciprocal() if operation in MULTIPLICATIONS else statistic
    squares = x.square()
    sizes = (x.std(axes, keepdim=True), squares.mean(axes, keepdim=True).sqrt(), squares.sum(axes, keepdim=True).sqrt())
    return any(bool(((size / own - 1).abs() < ROOM).all()) for own in sizes)


def _within(place: str, parent: str) -> bool:
    return not parent or f"{place}.".startswith(f"{parent}.")


def _differ(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return any(_differs(one, other) for one, other in zip(left, right))


def _differs(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.numel() == 0:
        return False
    difference = (one - other).abs()[one != other]
    ordinary = other[other.abs() < -traces.MASKED].abs()
    scale = float(ordinary.max()) if ordinary.numel() else 0.0
    return bool((difference > SLACK * max(scale, 1e-12)).any())
