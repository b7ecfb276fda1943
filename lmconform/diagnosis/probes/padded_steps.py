"""A decoding step under padding is wrong: does it see the padding, or is it misplaced?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.specimen import Unavailable, random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

TEXTS = ((14, 5), (45, 25))  # tokens and how many of them are padding: within a window and beyond one


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """One step on the cache of a left-padded text, with its own position as in the check: the pads' tokens replaced."""
    if not (subject.can("cache") and subject.can("mask")):
        raise Unavailable("needs a cache and a mask")
    for time, pads in TEXTS:
        if subject.longest(time) == time and (found := _examined(subject, seed, time, pads)):
            return found
    return []


def _examined(subject: Specimen, seed: int, time: int, pads: int) -> list[Finding]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    text = random_ids(subject.ordinary_ids, 1, time - pads, generator).to(subject.device)
    padding = random_ids(subject.ordinary_ids, 2, pads, generator).to(subject.device)
    mask = torch.ones(1, time, dtype=torch.int64, device=subject.device)
    mask[:, :pads] = 0
    places = subject.first_position + (mask.cumsum(-1) - 1).clamp(min=0)
    positioned = subject.convention.positions is not None
    alone = subject.logits(text)[:, -1:]
    bound = tolerance.allowed(subject.noise, alone)

    def step(row: int) -> Tensor:
        ids = torch.cat([padding[row : row + 1], text], dim=1)
        begun, last = (places[:, :-1], places[:, -1:]) if positioned else (None, None)
        cache = subject.forward(ids[:, :-1], mask=mask[:, :-1], positions=begun, use_cache=True).cache
        return subject.forward(ids[:, -1:], mask=mask, positions=last, cache=cache, use_cache=True).logits

    padded = step(0)
    if float((padded - alone).abs().max()) <= bound:
        return []
    if float((padded - step(1)).abs().max()) > bound:
        where = "in a decoding step other tokens under the padding give other logits"
        return [Finding("mask.padding_ignored", Verdict.seen, where), Finding("position.ignores_mask", Verdict.against)]
    return [Finding("mask.padding_ignored", Verdict.against)]
