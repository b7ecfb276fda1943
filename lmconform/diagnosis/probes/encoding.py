"""Is a position encoding made at all, does it tell positions apart, and where does it stop being relative?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lmconform import structure, tolerance
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.measuring.traces import hooked
from lmconform.specimen import random_ids

LEAP = 32  # positions: far enough for rates that differ by a hundredth
SLOW = 0.25  # of what a leap changes: a side that is not turned changes about as much in one step

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

NAMED = re.compile(r"(^|[._])(rot(ary)?\w*|pos|positions?|wpe|alibi|table)($|[._])", re.IGNORECASE)


def module(subject: Specimen, seed: int) -> list[Finding]:
    """Order does not matter: is a module that is called after positions run, and is its output one for all?"""
    time = subject.longest(12)
    seen: dict[str, bool] = {}

    def watch(name: str) -> Any:
        def note(part: Any, args: Any, output: Any) -> None:
            varying = [_varies(tensor, time) for tensor in _tensors(output)]
            known = [value for value in varying if value is not None]
            if known:
                seen[name] = any(known)

        return note

    named = [(name, part) for name, part in subject.module.named_modules() if name and NAMED.search(name)]
    with hooked(*(part.register_forward_hook(watch(name)) for name, part in named)):
        subject.logits(subject.probe_ids(1, time))
    if not seen:
        return []
    name = next(iter(seen))
    if any(seen.values()):
        where = f"{name} is called and tells positions apart, and its output reaches no logit"
        return [Finding("position.absent", Verdict.seen, where), Finding("position.no_op", Verdict.against)]
    where = f"{name} is called and gives the same for every position"
    return [Finding("position.no_op", Verdict.seen, where), Finding("position.absent", Verdict.against)]


def _tensors(output: Any) -> Iterator[Tensor]:
    import torch

    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)


def _varies(tensor: Tensor, time: int) -> bool | None:
    """Whether it differs along the axis that is as long as the text; None where there is no such axis."""
    axes = [axis for axis, size in enumerate(tensor.shape[:-1]) if size == time]
    if not axes or not tensor.is_floating_point():
        return None
    first = tensor.select(axes[-1], 0).unsqueeze(axes[-1])
    return bool((tensor - first).abs().max() > 1e-6)


def shift(subject: Specimen, seed: int) -> list[Finding]:
    """The same text at positions near the beginning and near the end of the context."""
    import torch

    far = subject.context_length
    if far is None or subject.convention.positions is None or far < 40:
        return []
    time = 12
    ids = random_ids(subject.ordinary_ids, 1, time, torch.Generator().manual_seed(seed)).to(subject.device)
    start = torch.arange(time, device=ids.device)[None] + subject.first_position
    base = subject.logits(ids, positions=start)
    bound = tolerance.allowed(subject.noise, base)

    def moved(by: int) -> float:
        return float((subject.logits(ids, positions=start + by) - base).abs().max())

    near, end = moved(3), moved(far - time - subject.first_position)
    broken = ("position.one_side_rotated", "position.not_relative", "position.base_kept")
    if near > bound and (where := _gains(subject, ids, start)):
        cleared = ("position.collision", *(other for other in broken if other != "position.not_relative"))
        cured = Finding("position.not_relative", Verdict.cured, where)
        return [cured, *(Finding(other, Verdict.against) for other in cleared)]
    if near > bound:
        cause, where = _unequal(subject, ids, bound)
        others = [Finding(other, Verdict.against) for other in broken if other != cause]
        return [Finding("position.collision", Verdict.against), Finding(cause, Verdict.seen, where), *others]
    where = (
        f"moved by 3 the logits stay, moved to the end of the context they change by {end:.2g}" if end > bound else ""
    )
    return [Finding("position.collision", Verdict.seen, where), *(Finding(cause, Verdict.against) for cause in broken)]


def _gains(subject: Specimen, ids: Tensor, start: Tensor) -> str:
    """Whether moving all positions stops to matter once norms inside attention have one gain for all channels.

    A rotation commutes with that; not with a gain for each channel, which therefore belongs in front of it.
    """
    import torch

    blocks = structure.blocks(subject.module)
    if blocks is None:
        return ""
    inside = [
        f"{blocks[0]}.{number}.{name}"
        for number, block in enumerate(blocks[1])
        for name, part in block.named_modules()
        if "norm" in type(part).__name__.lower() and "." in name  # a part of a part: the norms of queries and keys
    ]
    copied = subject.copy()
    with torch.no_grad():
        for name in inside:
            for gain in copied.module.get_submodule(name).parameters(recurse=False):
                gain.copy_(gain.mean(-1, keepdim=True).expand_as(gain))
    base, moved = copied.logits(ids, positions=start), copied.logits(ids, positions=start + 3)
    if not inside or float((base - moved).abs().max()) > tolerance.allowed(subject.noise, base):
        return ""
    return f"with one gain for all channels in {inside[0]} and its like, moving all positions changes nothing"


def _unequal(subject: Specimen, ids: Tensor, bound: float) -> tuple[str, str]:
    """All tokens at one position, which is then moved: turned alike, queries and keys still meet at the same angle.

    A side that is not turned feels one step at once; rates that differ a little add up with the distance.
    """
    import torch

    # without a mask, transformers takes tokens at equal positions for texts of their own
    ones = torch.ones_like(ids) if subject.can("mask") else None

    def at(position: int) -> Tensor:
        return subject.logits(ids, positions=torch.full_like(ids, position + subject.first_position), mask=ones)

    base = at(0)
    step, leap = (float((at(position) - base).abs().max()) for position in (1, LEAP))
    if max(step, leap) <= bound:
        where = "with all tokens at one position it does not matter at which: queries and keys are turned alike, twice"
        return "position.base_kept", where
    told = f"with all tokens at one position, moving it by 1 changes the logits by {step:.2g}, by {LEAP} by {leap:.2g}"
    return ("position.not_relative" if step < SLOW * leap else "position.one_side_rotated"), told
