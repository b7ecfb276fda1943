"""Which query heads share a head of keys and values, read off the operands of attention's products.

Under grouped-query attention keys and values are expanded to as many heads as there are queries. Which of the expanded
heads are equal says how they were dealt out, whatever the weights, the positions and the layers before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform.measuring.multihead import call_through

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

Labels = tuple[int, ...]  # per query head the number of its key/value head, counted in order of appearance
KEYS, VALUES = "keys", "values"
SHOWN = 16  # heads that a message lists


@dataclass(frozen=True)
class Regrouping:
    """How the subject hands out keys and values, how its reference does, and a context within which it does as well."""

    text: str
    applied: Callable[[], AbstractContextManager[None]]


def dealt_otherwise(ours: Specimen, theirs: Specimen, ids: Tensor) -> Regrouping | None:
    """What differs in which query heads share keys or values; None where nothing does or it cannot be seen in both.

    Heads that are alike in another order, with the same ones shared, are no such difference.
    """
    mine, right = _sharing(ours, ids), _sharing(theirs, ids)
    if [kind for kind, _ in mine] != [kind for kind, _ in right]:
        return None
    orders: list[list[int] | None] = []
    wrong: list[int] = []
    for place, ((_, own), (_, given)) in enumerate(zip(mine, right)):
        orders.append(None)
        if own != given and len(own) == len(given) and set(own) == set(given):
            orders[-1] = [own.index(head) for head in given]
            wrong.append(place)
    if not wrong:
        return None
    kinds = " and ".join(kind for kind in (KEYS, VALUES) if any(mine[place][0] == kind for place in wrong))
    (_, own), (_, given) = mine[wrong[0]], right[wrong[0]]
    text = f"{kinds} handed to the query heads as in the reference ({_spelt(given)} in place of {_spelt(own)})"
    return Regrouping(text, lambda: _reordered(ids.shape[0], orders))


def _sharing(specimen: Specimen, ids: Tensor) -> list[tuple[str, Labels]]:
    """Of every product with keys or values in one forward, in their order: which heads of the operand are equal."""
    found: list[tuple[str, Labels]] = []

    def note(kind: str, operand: Tensor) -> None:
        found.append((kind, _labels(operand)))

    with _operands_seen(ids.shape[0], note):
        specimen.logits(ids.to(specimen.device))
    return found


def _labels(operand: Tensor) -> Labels:
    """Of [batch, heads, ...]: heads that hold the same numbers get the same label."""
    import torch

    kept: list[int] = []
    labels = []
    for head in range(operand.shape[1]):
        same = next((k for k, first in enumerate(kept) if torch.equal(operand[:, head], operand[:, first])), len(kept))
        if same == len(kept):
            kept.append(head)
        labels.append(same)
    return tuple(labels)


def _spelt(labels: Labels) -> str:
    return " ".join(map(str, labels[:SHOWN])) + (" ..." if len(labels) > SHOWN else "")


@contextmanager
def _reordered(batch: int, orders: list[list[int] | None]) -> Iterator[None]:
    """Within it, the operand of the i-th product of every forward has its heads in `orders[i]`."""
    place = 0

    def reorder(kind: str, operand: Tensor) -> Tensor | None:
        nonlocal place
        order = orders[place % len(orders)]
        place += 1
        return None if order is None or len(order) != operand.shape[1] else operand[:, order]

    with _operands_seen(batch, reorder):
        yield


def _operands_seen(batch: int, see: Callable[[str, Tensor], Tensor | None]) -> AbstractContextManager[Any]:
    """Within it, `see` is given the keys or values [batch, heads, ...] of every attention product, and may change them.

    Seen are matmul, bmm, einsum and scaled_dot_product_attention.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    products = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}

    def seen(kind: str, operand: Tensor) -> Tensor:
        other = see(kind, operand)
        return operand if other is None else other

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in products and len(args) == 2 and (kind := _right_of(args[0], args[1], batch)):
                left, right = args
                args = (left, seen(kind, right.reshape(batch, -1, *right.shape[-2:])).reshape(right.shape))
            elif func is torch.einsum and len(args) == 3 and (found := _einsum_right_of(*args)):
                kind, axis = found
                equation, left, right = args
                args = (equation, left, seen(kind, right.movedim(axis, 1)).movedim(1, axis))
            elif func is torch.nn.functional.scaled_dot_product_attention:
                given = {**dict(zip(("query", "key", "value"), args)), **kwargs}
                query, key, value = (given.pop(name) for name in ("query", "key", "value"))
                if query.dim() == 4:
                    groups = query.shape[1] // key.shape[1]  # more than one with enable_gqa
                    key = seen(KEYS, key.repeat_interleave(groups, dim=1))
                    value = seen(VALUES, value.repeat_interleave(groups, dim=1))
                args, kwargs = (query, key, value, *args[3:]), given
            return call_through(self, func, args, kwargs)

    return Watching()


def _right_of(left: Tensor, right: Tensor, batch: int) -> str:
    """What `right` is in left @ right: values behind weights [..., time, time], or keys where such scores come out."""
    if left.dim() not in (3, 4) or left.shape[:-2] != right.shape[:-2] or left.is_complex():
        return ""
    if left.shape[0] % batch or left.shape[:-2].numel() == batch:  # Bloom has the heads in the batch
        return ""
    queries, inner = left.shape[-2:]
    if queries == inner and bool((left >= 0).all()):
        return VALUES
    return KEYS if queries == right.shape[-1] else ""


def _einsum_right_of(equation: str, left: Tensor, right: Tensor) -> tuple[str, int] | None:
    """The same of an einsum over batch, heads and two axes more: "bhqd,bkhd->bhqk"; and at which axis the heads are."""
    terms, _, out = equation.replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    kept = [name for name in second if name in first and name in out]
    four = len(first) == len(second) == left.dim() == right.dim() == 4
    if not four or len(kept) != 2 or second[0] != kept[0] or left.is_complex():
        return None
    sizes = {**dict(zip(first, left.shape)), **dict(zip(second, right.shape))}
    queries, inner, last = set(first) - set(second), set(first) & set(second) - set(out), set(second) - set(first)
    if not len(queries) == len(inner) == len(last) == 1:
        return None
    time = sizes[queries.pop()]
    if time == sizes[inner.pop()] and bool((left >= 0).all()):
        return VALUES, second.index(kept[1])
    return (KEYS, second.index(kept[1])) if time == sizes[last.pop()] else None
