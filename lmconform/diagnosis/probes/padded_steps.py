"""A decoding step under padding is wrong: does it see the padding, or is it misplaced?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.specimen import Unavailable, random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

PADS, TIME = 5, 14


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """One step on the cache of a left-padded text: the pads' tokens replaced, and its position given."""
    import torch

    if not (subject.can("cache") and subject.can("mask")):
        raise Unavailable("needs a cache and a mask")
    generator = torch.Generator().manual_seed(seed)
    text = random_ids(subject.ordinary_ids, 1, TIME - PADS, generator).to(subject.device)
    pads = random_ids(subject.ordinary_ids, 2, PADS, generator).to(subject.device)
    mask = torch.ones(1, TIME, dtype=torch.int64, device=subject.device)
    mask[:, :PADS] = 0
    places = subject.first_position + (mask.cumsum(-1) - 1).clamp(min=0)
    positioned = subject.convention.positions is not None
    alone = subject.logits(text)[:, -1:]
    bound = tolerance.allowed(subject.noise, alone)

    def step(row: int, explicit: bool) -> Tensor:
        ids = torch.cat([pads[row : row + 1], text], dim=1)
        begun = subject.forward(
            ids[:, :-1], mask=mask[:, :-1], positions=places[:, :-1] if positioned else None, use_cache=True
        )
        given = places[:, -1:] if explicit and positioned else None
        return subject.forward(ids[:, -1:], mask=mask, positions=given, cache=begun.cache, use_cache=True).logits

    wrong = float((step(0, False) - alone).abs().max())
    if wrong <= bound:
        return []
    if float((step(0, True) - step(1, True)).abs().max()) > bound:
        where = "in a decoding step other tokens under the padding give other logits"
        return [Finding("mask.padding_ignored", Verdict.seen, where), Finding("position.ignores_mask", Verdict.against)]
    found = [Finding("mask.padding_ignored", Verdict.against)]
    after = float((step(0, True) - alone).abs().max())
    if positioned and after <= bound:
        where = f"with explicit position_ids the padded step is right: {after:.2g} off in place of {wrong:.2g}"
        found.append(Finding("position.ignores_mask", Verdict.cured, where))
    return found
