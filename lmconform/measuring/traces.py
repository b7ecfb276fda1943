"""What happens inside one forward: the residual stream block by block, module outputs, attention scores.

Nothing is asked of the model: hooks read the stream, and a function mode sees softmax and scaled_dot_product_attention
whichever implementation calls them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmconform import structure
from lmconform.measuring.multihead import call_through

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.specimen import Specimen

TIMES = (23, 19, 17, 29, 31, 13, 11)  # primes: a product of two other sizes is none
MASKED = -5000.0  # additive masks lie below (-1e4 and less), saturated scores that underflow above


def distinct_length(subject: Specimen) -> int | None:
    """A number of tokens by which an axis of time can be told: it divides no size of a weight. None: there is none."""
    module = subject.module
    held = {size for tensor in (*module.parameters(), *module.buffers()) for size in tensor.shape}
    free = (time for time in TIMES if all(size % time for size in held if size))
    return next((time for time in free if subject.longest(time) == time), None)


@dataclass
class Stream:
    """The residual stream: `states[0]` goes into the first block, `states[i + 1]` comes out of block i.

    Each is [batch, time, width]; `names[i]` says where `states[i]` was read.
    """

    names: list[str]
    states: list[Tensor]
    logits: Tensor


def stream(subject: Specimen, ids: Tensor) -> Stream | None:
    """The stream for `ids`: read at the blocks by hooks, else as forward() gives it; None where neither can be had."""
    found = structure.blocks(subject.module)
    if found is None:
        return _given_stream(subject, ids)
    name, blocks = found
    parts = [(index, part) for index, block in enumerate(blocks) for part in structure.called(block)]
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}

    def enters(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen = hidden_in((*args, *kwargs.values()), ids, either_way=True)
            if seen is not None:
                before.setdefault(index, seen)

        return hook

    def leaves(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen = hidden_in(output if isinstance(output, tuple | list) else (output,), ids, either_way=True)
            if seen is not None:
                after[index] = seen

        return hook

    with (
        hooked(*(part.register_forward_pre_hook(enters(i), with_kwargs=True) for i, part in parts)),
        hooked(*(part.register_forward_hook(leaves(i)) for i, part in parts)),
    ):
        logits = subject.logits(ids)
    order = sorted(after)
    if not order or order[0] not in before or any(state.shape != after[order[0]].shape for state in after.values()):
        return _given_stream(subject, ids)
    if any(later in before and not _alike(after[index], before[later]) for index, later in itertools.pairwise(order)):
        return _given_stream(subject, ids)  # a list of parts that do not feed one another, as XLM's ffns
    return Stream(
        [f"the input of {name}.{order[0]}", *(f"{name}.{index}" for index in order)],
        [before[order[0]], *(after[index] for index in order)],
        logits,
    )


def _alike(left: Tensor, right: Tensor) -> bool:
    """Whether one is much the same vector as the other: their cosine exceeds one half."""
    if left.shape != right.shape:
        return False
    cosine = (left.double() * right.double()).sum() / (left.double().norm() * right.double().norm())
    return not float(cosine) <= 0.5


def _given_stream(subject: Specimen, ids: Tensor) -> Stream | None:
    if subject.convention.hidden_states is None:
        return None
    output = subject.forward(ids, hidden_states=True, use_cache=False)
    states = [state for state in output.hidden_states or () if state.shape[:2] == ids.shape and state.dim() == 3]
    if not states:
        return None
    return Stream([f"hidden_states[{index}]" for index in range(len(states))], states, output.logits)


def hidden_in(values: Any, ids: Tensor, *, either_way: bool = False) -> Tensor | None:
    """The first floating [batch, time, width] tensor among `values`; `either_way`: or [time, batch, width], turned."""
    import torch

    for value in values:
        if isinstance(value, torch.Tensor) and value.dim() == 3 and value.is_floating_point():
            if value.shape[:2] == ids.shape:
                return value.detach().clone()  # some blocks add to their input in place
            if either_way and value.shape[:2] == ids.shape[::-1]:
                return value.detach().transpose(0, 1).clone()
    return None


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@dataclass
class Call:
    """One module's call: `output` and, where they are tensors, its first input; in the order in which calls end."""

    name: str
    input: Tensor | None
    output: Tensor


def calls(subject: Specimen, ids: Tensor) -> list[Call]:
    """Every submodule's call in one forward, inner ones first."""
    return recorded(subject, lambda: subject.logits(ids))


def recorded(subject: Specimen, run: Callable[[], object]) -> list[Call]:
    """Every submodule's call while `run` runs the subject, inner ones first."""
    import torch

    made: list[Call] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            with torch._C.DisableTorchFunctionSubclass():  # a subclass may know none of what is done with it later
                inputs = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point()]
                outputs = output if isinstance(output, tuple | list) else (output,)
                tensors = [v for v in outputs if isinstance(v, torch.Tensor) and v.is_floating_point()]
                if tensors:
                    made.append(Call(name, inputs[0].detach() if inputs else None, tensors[0].detach().clone()))

        return hook

    named = [(name, part) for name, part in subject.module.named_modules() if name]
    with hooked(*(part.register_forward_hook(watch(name), with_kwargs=True) for name, part in named)):
        run()
    return made


@dataclass
class Scores:
    """Attention before the softmax in one block: `values` [batch, heads, query, key], `visible` where it may look.

    `head_dim` is the length of the vectors that were multiplied, None where the product was not seen.
    """

    block: int
    values: Tensor
    visible: Tensor
    head_dim: int | None


@dataclass
class _Watch:
    batch: int
    time: int
    block: int = -1
    head_dim: int | None = None
    found: list[Scores] = field(default_factory=list)


def attention_scores(subject: Specimen, ids: Tensor) -> list[Scores]:
    """All attention scores of one forward, seen at softmax and scaled_dot_product_attention; empty where none is."""
    with scores_seen(subject, ids) as found:
        subject.logits(ids)
    return found


@contextmanager
def scores_seen(
    subject: Specimen, ids: Tensor, change: Callable[[Scores], Tensor | None] = lambda scores: None
) -> Iterator[list[Scores]]:
    """Within it, attention scores of forwards on tokens of the shape of `ids` are added to the list that it gives.

    Where `change` makes other values of them, attention goes on with these.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    watch = _Watch(*ids.shape)
    softmaxes = {torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax, torch.special.softmax}
    products = {
        torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.baddbmm,
        torch.Tensor.baddbmm, torch.einsum,
    }  # fmt: skip

    class Listener(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            result = call_through(self, func, args, kwargs)
            known = len(watch.found)
            if func in products:
                _note_product(watch, func, args, kwargs, result)
            elif func in softmaxes:
                _note_softmax(watch, args, kwargs, result)
            elif func is torch.nn.functional.scaled_dot_product_attention:
                _note_sdpa(watch, args, kwargs)
            if len(watch.found) == known or (values := change(watch.found[-1])) is None:
                return result
            if func in softmaxes:
                return values.to(result.dtype).softmax(-1).view_as(result)
            value = args[2] if len(args) > 2 else kwargs["value"]
            value = value.repeat_interleave(values.shape[1] // value.shape[1], dim=1)
            weights = values.masked_fill(~watch.found[-1].visible, -torch.inf).softmax(-1).nan_to_num(0.0)
            return weights.to(value.dtype) @ value

    found = structure.blocks(subject.module)
    blocks: Iterable[nn.Module] = found[1] if found is not None else ()
    parts = [(index, part) for index, block in enumerate(blocks) for part in structure.called(block)]

    def enters(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            watch.block = index

        return hook

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        watch.block = -1

    with (
        hooked(*(part.register_forward_pre_hook(enters(i)) for i, part in parts)),
        hooked(*(part.register_forward_hook(leaves) for _, part in parts)),
        Listener(),
    ):
        yield watch.found


def _note_product(watch: _Watch, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    import torch

    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.dim() >= 2]
    if result.dim() >= 3 and result.shape[-2] == watch.time and result.shape[-1] >= watch.time and len(tensors) >= 2:
        watch.head_dim = int(tensors[-2].shape[-1])


def _note_softmax(watch: _Watch, args: Any, kwargs: Any, result: Any) -> None:
    import torch

    values = args[0] if args else kwargs.get("input")
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(values, torch.Tensor) or values.dim() not in (3, 4) or axis not in (-1, values.dim() - 1):
        return
    if values.shape[-2] != watch.time or values.shape[-1] < watch.time or values.shape[0] % watch.batch:
        return
    if values.dim() == 3:  # heads folded into the batch, as in Bloom
        values, result = (x.unflatten(0, (watch.batch, -1)) for x in (values, result))
    if values.shape[0] == watch.batch:
        _keep(watch, values, (result > 0) | (values > MASKED), watch.head_dim)


def _note_sdpa(watch: _Watch, args: Any, kwargs: Any) -> None:
    import torch

    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, args)), **kwargs}
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    if query.dim() != 4 or query.shape[0] != watch.batch or query.shape[-2] != watch.time:
        return
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = given.get("scale")
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones_like(scores, dtype=torch.bool)
    if given.get("is_causal"):
        visible = visible.tril(key.shape[-2] - query.shape[-2])
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        scores = scores + mask
        visible = visible & (mask > torch.finfo(mask.dtype).min / 2)
    _keep(watch, scores, visible, int(query.shape[-1]))


def _keep(watch: _Watch, values: Tensor, visible: Tensor, head_dim: int | None) -> None:
    watch.found.append(Scores(watch.block, values.detach(), visible.detach(), head_dim))
