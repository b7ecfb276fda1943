"""Why does a cached step differ from one forward: its positions, what is in the cache, or what is read of it?"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.diagnosis.probes.forms import forms_differ
from lmconform.diagnosis.probes.places import first_difference
from lmconform.diagnosis.probes.step_reach import seen_beyond
from lmconform.measuring.attending import may_attend
from lmconform.specimen import Unavailable, random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

CONTENTS = ("cache.stale", "cache.wrong_value", "cache.truncated", "cache.ignored")
TIME, LONG = 20, 72
Named = list[tuple[str, "Tensor"]]


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """A short text decoded on top of its own cache, and, where that is right, a long one."""
    import torch

    if not subject.can("cache"):
        raise Unavailable("no cache")
    texts = [
        random_ids(subject.ordinary_ids, 1, time, torch.Generator().manual_seed(seed)).to(subject.device)
        for time in dict.fromkeys((subject.longest(TIME), subject.longest(LONG)))
    ]
    if told := forms_differ(subject, texts[-1]):
        others = ("position.restarts_on_decode", *CONTENTS)
        return [Finding("mixer.forms_differ", Verdict.seen, told), *(Finding(c, Verdict.ruled_out) for c in others)]
    forms_agree = Finding("mixer.forms_differ", Verdict.against)
    for ids in texts:
        if found := _examined(subject, ids):
            time = ids.shape[1]
            if time > TIME and not any(finding.cause == "mask.window" for finding in found):
                where = f"after {TIME} tokens a cached step is right, after {time} it is not"
                found = [finding for finding in found if finding.cause not in CONTENTS]
                found += [Finding(cause, Verdict.against) for cause in CONTENTS if cause != "cache.truncated"]
                found.append(Finding("cache.truncated", Verdict.seen, where))
            return [*found, forms_agree]
    return [forms_agree]


def _examined(subject: Specimen, ids: Tensor) -> list[Finding]:
    """The last two tokens of a text on top of the cache of the rest: given their positions, and their cache compared.

    Cached tensors are changed one by one: those that nobody reads move no logit. The cache after the steps should hold
    what one forward over the whole text leaves.
    """
    import torch

    time = ids.shape[1]
    full = subject.forward(ids, use_cache=True)
    whole = full.logits[:, -1:]
    bound = tolerance.allowed(subject.noise, whole)

    def prefix(explicit: bool = False) -> Any:
        cache = subject.forward(ids[:, :-2], use_cache=True).cache
        positions = torch.full((1, 1), subject.first_position + time - 2, device=ids.device) if explicit else None
        return subject.forward(ids[:, -2:-1], cache=cache, use_cache=True, positions=positions).cache

    def step(cache: Any, explicit: bool = False) -> Any:
        positions = torch.full((1, 1), subject.first_position + time - 1, device=ids.device) if explicit else None
        return subject.forward(ids[:, -1:], cache=cache, use_cache=True, positions=positions)

    stepped = step(prefix())
    error = float((stepped.logits - whole).abs().max())
    if error <= bound:
        return _reordered(list(tensors(stepped.cache)), list(tensors(full.cache)), time)
    used, unused = (_one_step(specimen, ids) for specimen in (subject, subject.unused()))
    if unused <= bound < used:
        where = f"in a model that has answered nothing before, the same step is {unused:.2g} off in place of {used:.2g}"
        others = ("position.restarts_on_decode", *CONTENTS)
        return [Finding("state.carried_over", Verdict.cured, where), *(Finding(c, Verdict.against) for c in others)]
    if float((subject.logits(ids[:, :-2]) - full.logits[:, :-2]).abs().max()) > bound:  # no matter of the cache
        return [Finding(cause, Verdict.against) for cause in ("position.restarts_on_decode", *CONTENTS)]
    found: list[Finding] = []
    if subject.convention.positions is not None:
        after = float((step(prefix(explicit=True), explicit=True).logits - whole).abs().max())
        if after <= bound:
            where = f"with explicit position_ids the cached step is right: {after:.2g} off in place of {error:.2g}"
            cleared = [Finding(cause, Verdict.against) for cause in CONTENTS]
            return [Finding("position.restarts_on_decode", Verdict.cured, where), *cleared]
        found.append(Finding("position.restarts_on_decode", Verdict.against))
    place = _place(subject, ids)
    if _from_the_start(subject, ids, list(tensors(stepped.cache))):
        where = "the newest cached key is the one that the token would have at position 0"
        cleared = [Finding(cause, Verdict.against) for cause in CONTENTS]
        return [Finding("position.restarts_on_decode", Verdict.cured, where), *cleared]
    before = prefix()
    given = [(name, tensor, tensor._version) for name, tensor in tensors(before) if "_states" not in name]
    step(before)
    written = [name for name, tensor, version in given if tensor._version != version]
    if written:
        where = f"a step writes into {written[0]} of the cache that it was given"
        found.append(Finding("cache.mutated_in_place", Verdict.seen, where))
    before = prefix()
    if beyond := seen_beyond(lambda: subject.logits(ids), lambda: step(before)):
        found += [Finding("mask.window", Verdict.seen, beyond), Finding("position.restarts_on_decode", Verdict.against)]
        return found + [Finding(cause, Verdict.ruled_out) for cause in CONTENTS]
    before = prefix()
    where = _unread(before, lambda cache: step(cache).logits, bound)
    culprit, stale = "cache.ignored" if where else "", Verdict.against
    if not culprit:
        held = list(tensors(before)), list(tensors(stepped.cache)), list(tensors(full.cache))
        culprit, where = _contents(*held, first_number(place))
        if culprit == "cache.wrong_value" and _all_moved(*held):
            stale = Verdict.ruled_out
        if not (culprit or written) and (where := _read_otherwise(subject, ids, *held[1:], place)):
            culprit = "cache.wrong_value"
            found.append(Finding("position.restarts_on_decode", Verdict.against))
    if culprit == "cache.ignored" or not _attends(subject, place):
        found.append(Finding("position.restarts_on_decode", Verdict.against))
    for cause in CONTENTS:
        if cause == culprit and not written:
            found.append(Finding(cause, Verdict.seen, "; ".join(filter(None, [where, place]))))
        elif cause == "cache.stale" and stale == Verdict.ruled_out:
            found.append(Finding(cause, stale))
        else:
            found.append(Finding(cause, Verdict.against if culprit or written else Verdict.place, place))
    return found


def _one_step(specimen: Specimen, ids: Tensor) -> float:
    """The error of the last token's step on the cache of all tokens before it, by the same specimen's one forward."""
    whole = specimen.logits(ids)[:, -1:]
    cache = specimen.forward(ids[:, :-1], use_cache=True).cache
    return float((specimen.forward(ids[:, -1:], cache=cache, use_cache=True).logits - whole).abs().max())


def _from_the_start(subject: Specimen, ids: Tensor, stepped: Named) -> bool:
    """Whether the first layer's newest key is that of the same token alone, with no past before it."""
    alone = list(tensors(subject.forward(ids[:, -1:], use_cache=True).cache))
    if not stepped or not alone or alone[0][1].dim() != 4 or stepped[0][1].dim() != 4:
        return False
    (_, key), (_, first) = stepped[0], alone[0]
    axis = next((a for a, size in enumerate(first.shape) if size == 1 and key.shape[a] > 1), None)
    if axis is None:
        return False
    newest, size = key.select(axis, -1).double(), float(first.abs().max())
    same = float((newest - first.select(axis, 0).double()).abs().max()) <= 1e-4 * size
    whole = next(tensors(subject.forward(ids, use_cache=True).cache))[1].select(axis, -1).double()
    return same and float((newest - whole).abs().max()) > 1e-3 * size


def tensors(cache: Any, name: str = "cache") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a tuple of tuples, a transformers Cache or an object of the model's own, by the way to them."""
    import torch

    if isinstance(cache, torch.Tensor):
        yield name, cache
    elif isinstance(cache, list | tuple):
        for index, part in enumerate(cache):
            yield from tensors(part, f"{name}[{index}]")
    elif isinstance(cache, dict):
        for key, part in cache.items():
            yield from tensors(part, f"{name}[{key!r}]")
    elif hasattr(cache, "layers"):
        for index, layer in enumerate(cache.layers):  # keys and values, or the states of a recurrent layer
            for key, part in vars(layer).items():
                yield from tensors(part, f"{name}.layers[{index}].{key}")
    elif hasattr(cache, "__dict__"):
        for key, part in vars(cache).items():
            if isinstance(part, torch.Tensor | list | tuple | dict):  # what else it holds may hold anything
                yield from tensors(part, f"{name}.{key}")


def _reordered(stepped: Named, full: Named, time: int) -> list[Finding]:
    """A single step may be right on a cache that holds the tokens in another order: it sees all of them.

    A ring buffer holds them turned round, which is its way.
    """
    for (name, mine), (_, right) in zip(stepped, full):
        if not mine.numel() or not mine.is_floating_point():
            continue
        if mine.shape != right.shape:
            return []
        near = 1e-4 * float(right.abs().max())

        def differs(left: Tensor, right: Tensor, near: float = near) -> bool:
            return float((left.double() - right.double()).abs().max()) > near

        if not differs(mine, right):
            continue
        axis = next((axis for axis in range(1, mine.dim() - 1) if mine.shape[axis] == time), None)
        if axis is None or differs(mine.sort(axis).values, right.sort(axis).values):
            return []
        if not all(differs(mine.roll(turn, axis), right) for turn in range(1, time)):
            return []
        where = f"{name} holds the tokens in another order than one forward leaves them"
        return [Finding("cache.wrong_value", Verdict.seen, where), Finding("mask.query_offset", Verdict.against)]
    return []


def first_number(name: str) -> int | None:
    """The number of the block in the name of a module or of a cached tensor."""
    found = re.search(r"\d+", name)
    return int(found[0]) if found else None


def _contents(before: Named, stepped: Named, full: Named, place: int | None) -> tuple[str, str]:
    """Which cause the first tensor shows that the step left otherwise than one forward does; "" where none does.

    `place`: the block where the step first differs. New entries of later blocks alone are made from what is wrong
    already, and say nothing about the cache.
    """
    import torch

    for (_, old), (name, mine), (_, right) in zip(before, stepped, full):
        if mine.shape != right.shape:
            if mine.shape == old.shape:
                return "cache.stale", f"{name} is {list(mine.shape)} after the step as before it: nothing was stored"
            return "cache.truncated", f"{name} is {list(mine.shape)} after the step, {list(right.shape)} in one forward"
        size = max(float(right.abs().max()), 1e-12)
        difference = (mine.double() - right.double()).abs()
        if float(difference.max()) <= 1e-4 * size:
            continue
        axis = next((a for a, (m, o) in enumerate(zip(mine.shape, old.shape)) if m != o), None)
        if axis is not None:
            new, last = mine.select(axis, -1), mine.select(axis, -2)
            arrived = float((new.double() - right.select(axis, -1).double()).abs().max()) <= 1e-4 * size
            if not arrived and float((new.double() - last.double()).abs().max()) <= 1e-6 * size:
                return "cache.stale", f"the newest place of {name} holds what the place before it holds"
            number = first_number(name)
            old_right = (
                float(difference.narrow(axis, 0, mine.shape[axis] - 2).max()) <= 1e-4 * size
            )  # two steps were made
            if old_right and place is not None and number is not None and place < number:
                return "", ""
        if axis is None and torch.equal(mine, old):
            return "cache.stale", f"{name} is the same after the step as before it"
        return "cache.wrong_value", f"{name} is {float(difference.max()):.2g} off what one forward leaves there"
    return "", ""


def _all_moved(before: Named, stepped: Named, full: Named) -> bool:
    """Whether states, which do not grow, have changed in a step wherever they should have: none is left as it was."""
    kept = [(old, mine, right) for (_, old), (_, mine), (_, right) in zip(before, stepped, full)]
    if any(not old.shape == mine.shape == right.shape for old, mine, right in kept):
        return False
    return not any(bool(((mine == old) & (right != old)).any()) for old, mine, right in kept)


def _read_otherwise(subject: Specimen, ids: Tensor, stepped: Named, full: Named, place: str) -> str:
    """Whether the block of `place`, an attention that errs, keeps what one forward leaves there, its position included.

    That the newest entry is not the one that the same token has at the start of a text shows that it has its position.
    """

    def same(one: Tensor, other: Tensor) -> bool:
        return float((one.double() - other.double()).abs().max()) <= 1e-4 * float(other.abs().max())

    block = first_number(place)
    inside = [(mine, right) for (name, mine), (_, right) in zip(stepped, full) if first_number(name) == block]
    if block is None or not inside or any(mine.shape != right.shape or not mine.numel() for mine, right in inside):
        return ""
    if not all(same(mine, right) for mine, right in inside):
        return ""
    if not may_attend(subject, [subject.module.get_submodule(place)]):
        return ""
    alone = list(tensors(subject.forward(ids[:, -1:], use_cache=True).cache))
    for (name, right), (_, first) in zip(full, alone):
        axis = next((a for a, (one, all_) in enumerate(zip(first.shape, right.shape)) if one == 1 < all_), None)
        if axis is None or first_number(name) != first_number(full[0][0]):
            continue
        if not same(right.select(axis, -1), first.select(axis, 0)):
            return f"what block {block} keeps after the step is what one forward leaves there: it is read otherwise"
    return ""


def _attends(subject: Specimen, place: str) -> bool:
    """Whether the module named so may be an attention; where there is no such module, it may."""
    try:
        part = subject.module.get_submodule(place) if place else None
    except AttributeError:
        return True
    return part is None or may_attend(subject, [part])


def _unread(cache: Any, step: Any, bound: float) -> str:
    """A cached tensor that can be changed without any effect on the next logits."""
    base = step(copy.deepcopy(cache))
    for index, (name, _) in enumerate(tensors(cache)):
        changed = copy.deepcopy(cache)
        tensor = list(tensors(changed))[index][1]
        tensor.copy_(tensor.flip(0, -1) * 1.5 + 0.25)
        if float((step(changed) - base).abs().max()) <= bound:
            return f"changing {name} moves no logit: it is not read"
    return ""


def _place(subject: Specimen, ids: Tensor) -> str:
    time = ids.shape[1]

    def last(tensor: Tensor) -> Tensor | None:
        return tensor[:, -1:] if tensor.dim() >= 2 and tensor.shape[1] in (1, time) else None

    cache = subject.forward(ids[:, :-1], use_cache=True).cache
    return first_difference(
        subject,
        (lambda: subject.forward(ids[:, -1:], cache=cache, use_cache=True), last),
        (lambda: subject.logits(ids), last),
    )
