"""What a difference to the reference says: remedies that are tried out on the subject, and put back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lmconform.context import Hint
from lmconform.measuring.head_sharing import dealt_otherwise
from lmconform.measuring.pairing import Pair, pair_parameters, unclaimed
from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.specimen import Specimen

    Differs = Callable[[], float]  # the subject's largest difference to the reference, anew

SAME = 1e-4  # of the difference itself: what may be left of it where it is explained


# -- before the first block --------------------------------------------------------------------------------------------


def added_by_position(ours: Specimen, theirs: Specimen, mine: Tensor, expected: Tensor) -> Hint | None:
    """A difference [batch, time, width] that is the same for every token at a position: whose table is it?

    None where it depends on the token too, or on nothing.
    """
    added = mine.double() - expected.double()
    size = float(added.abs().max())
    if len(added) < 2 or float((added - added[:1]).abs().max()) > SAME * size:
        return None
    added = added[0]
    if float((added - added[:1]).abs().max()) <= SAME * size:
        return None  # a constant, and no position
    for specimen, sign in ((ours, 1.0), (theirs, -1.0)):
        for name, table in _tables(specimen.module):
            by = _read_later(table, added, SAME * size) if specimen is ours else None
            if by is not None:
                return Hint(
                    f"row t + {by} of {name} is read for position t, the reference reads row t: the table is indexed "
                    "off by that many, or positions are counted from another start",
                    "position.offset",
                )
            at = _rows_from(table, sign * added, SAME * size)
            if at is None:
                continue
            rows = f"row t{f' + {at}' if at else ''} of {name}"
            if specimen is ours:
                return Hint(
                    f"what is added at position t is {rows}, whatever the token: positions that the reference does not "
                    "have; if they are the base model's own, they were not taken out under the new encoding",
                    "position.base_kept",
                )
            return Hint(
                f"what is missing at position t is {rows} of the reference, whatever the token: its positions are not "
                "added here",
                "position.absent",
                "position.no_op",
            )
    return Hint(
        "the difference is the same for every token at a position, so it comes from the positions alone: the table is "
        "read elsewhere (off by one, or counted from another start), or a second encoding is added",
        "position.offset",
        "position.base_kept",
    )


def _tables(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors that are neither, of two axes."""
    import torch

    seen: set[int] = set()
    for prefix, part in module.named_modules():
        plain = {name: value for name, value in vars(part).items() if isinstance(value, torch.Tensor)}
        for name, value in {**part._parameters, **part._buffers, **plain}.items():
            if isinstance(value, torch.Tensor) and value.dim() == 2 and id(value) not in seen:
                seen.add(id(value))
                yield f"{prefix}.{name}" if prefix else name, value.detach().cpu().double()


def _rows_from(table: Tensor, rows: Tensor, bound: float) -> int | None:
    """At which row of `table` the consecutive `rows` [time, width] begin; None where they stand nowhere in it."""
    if table.shape[1] != rows.shape[1] or len(table) < len(rows):
        return None
    for start in range(min(8, len(table) - len(rows) + 1)):
        if float((table[start : start + len(rows)] - rows).abs().max()) <= bound:
            return start
    return None


def _read_later(table: Tensor, rows: Tensor, bound: float) -> int | None:
    """By how many rows of `table` the index must be off for `rows` [time, width] to be the difference."""
    if table.shape[1] != rows.shape[1]:
        return None
    for by in range(1, min(4, len(table) - len(rows) + 1)):
        if float((table[by : by + len(rows)] - table[: len(rows)] - rows).abs().max()) <= bound:
            return by
    return None


# -- inside a block ----------------------------------------------------------------------------------------------------


def turned_twice(theirs: Specimen, mine: Tensor, ids: Tensor, columns: int, bound: float) -> Hint | None:
    """Whether the reference gives the subject's logits [batch, time, vocab] once its positions count by two.

    Turning q and k once more by the same angles is that; the reference must take position_ids.
    """
    import torch

    if not theirs.can("pos"):
        return None
    doubled = 2 * torch.arange(ids.shape[1], device=theirs.device).expand_as(ids)
    if theirs.longest(int(doubled.max()) + 1) <= int(doubled.max()):
        return None  # beyond the context
    # without a mask transformers takes positions that leap for sequences packed into one row
    spelt: dict[str, Tensor] = {"mask": torch.ones_like(doubled)} if theirs.can("mask") else {}
    try:
        given = theirs.logits(ids.to(theirs.device), positions=doubled, **spelt)[..., :columns].cpu()
    except (Unavailable, IndexError, ValueError):
        return None
    if float((given.double() - mine.double()).abs().max()) > 2 * bound:
        return None
    return Hint(
        "tried out: the reference gives these logits when its positions count 0, 2, 4, ...: queries and keys are "
        "turned twice, by the base model's own rotary positions and by those put on top",
        "position.base_kept",
    )


def dealt(ours: Specimen, theirs: Specimen, ids: Tensor, differs: Differs, bound: float) -> Hint | None:
    """Whether the subject equals its reference once keys and values are handed to the query heads as they are there."""
    regrouping = dealt_otherwise(ours, theirs, ids)
    if regrouping is None:
        return None
    with regrouping.applied():
        after = differs()
    if not after <= bound:
        return None
    return Hint(f"tried out: with {regrouping.text} the logits equal the reference's", "attention.kv_groups")


def own_scale(ours: Specimen, theirs: Specimen, differs: Differs, bound: float) -> Hint | None:
    """Whether the subject equals its reference once the scalars and vectors that only it has are 1."""
    import torch

    pairs = pair_parameters(ours.module, theirs.module)
    free = {
        name: value
        for name in unclaimed(ours.module, pairs)
        if (value := ours.module.get_parameter(name)).dim() <= 1 and not bool((value == 1).all())
    }
    if not free:
        return None
    kept = {name: value.detach().clone() for name, value in free.items()}
    before = differs()
    with torch.no_grad(), _put_back(free, kept):
        for value in free.values():
            value.fill_(1.0)
        after = differs()
    if not after <= max(bound, SAME * before):
        return None
    low = min(float(value.min()) for value in kept.values())
    high = max(float(value.max()) for value in kept.values())
    names = ", ".join(list(free)[:3]) + (f" and {len(free) - 3} more" if len(free) > 3 else "")
    off = low == high == 0
    return Hint(
        f"tried out: with {names} set to 1 the logits equal the reference's; they are {_span(low, high)}, a scale that "
        "the reference does not have: start it at 1, or make up for it in the weights",
        *(("attention.gated_off", "scale.hidden") if off else ("scale.hidden", "attention.gated_off")),
    )


def _span(low: float, high: float) -> str:
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


@contextmanager
def _put_back(places: Mapping[str, Tensor], kept: dict[str, Tensor]) -> Iterator[None]:
    try:
        yield
    finally:
        for name, value in kept.items():
            places[name].copy_(value)


# -- fused projections -------------------------------------------------------------------------------------------------


def fused_otherwise(ours: Specimen, theirs: Specimen, differs: Differs, bound: float) -> Hint | None:
    """`other_view` of the first fused projection that the reference's numbers are found in."""
    for pair in pair_parameters(ours.module, theirs.module):
        shape = theirs.module.get_parameter(pair.reference).shape
        if len(shape) == 2 and max(shape) == 3 * min(shape) and pair.links:
            return other_view(ours, pair, differs, bound)
    return None


def other_view(ours: Specimen, pair: Pair, differs: Differs, bound: float) -> Hint | None:
    """Whether a fused projection, in all layers, is right once its outputs are grouped the other way.

    [heads, (q, k, v), size] and [(q, k, v), heads, size] have one shape; every number of heads that fits is tried.
    """
    import torch

    names = {link.subject for link in pair.links}
    if len(names) != 1 or pair.found < 1.0:
        return None
    like = {re.sub(r"\d+", "#", name.rpartition(".")[0]) for name in names}
    places = {
        name: value
        for name, value in ours.module.named_parameters()
        if re.sub(r"\d+", "#", name.rpartition(".")[0]) in like
    }
    matrices = [value for value in places.values() if value.dim() == 2]
    if not matrices or any(3 * min(value.shape) != max(value.shape) for value in matrices):
        return None
    width = min(matrices[0].shape)
    kept = {name: value.detach().clone() for name, value in places.items()}
    before = differs()
    for heads in (n for n in range(2, width // 2 + 1) if width % n == 0):
        size = width // heads
        for first, shape in (("(q, k, v)", (3, heads, size)), ("heads", (heads, 3, size))):
            order = torch.arange(3 * width).view(shape).transpose(0, 1).flatten()
            with torch.no_grad(), _put_back(places, kept):
                for name, value in places.items():
                    axis = next((i for i, n in enumerate(value.shape) if n == 3 * width), None)
                    if axis is not None:
                        value.copy_(kept[name].index_select(axis, order.to(value.device)))
                after = differs()
            if after <= max(bound, SAME * before):
                views = f"[(q, k, v), {heads} heads, {size}]", f"[{heads} heads, (q, k, v), {size}]"
                code, weights = views if first == "heads" else views[::-1]
                owner = next(iter(names)).rpartition(".")[0]
                return Hint(
                    f"tried out: with the outputs of {owner} regrouped, and of its like in every layer, the logits "
                    f"equal the reference's: the weights are laid out as {weights}, the code views them as {code}",
                    "attention.heads_scrambled",
                )
    return None
