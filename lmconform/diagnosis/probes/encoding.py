"""Is a position encoding made at all, does it tell positions apart, and where does it stop being relative?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.measuring.traces import hooked
from lmconform.specimen import random_ids

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
    broken = ("position.one_side_rotated", "position.not_relative")
    if near > bound:
        return [Finding("position.collision", Verdict.against), *(Finding(cause, Verdict.agrees) for cause in broken)]
    where = (
        f"moved by 3 the logits stay, moved to the end of the context they change by {end:.2g}" if end > bound else ""
    )
    return [Finding("position.collision", Verdict.seen, where), *(Finding(cause, Verdict.against) for cause in broken)]
