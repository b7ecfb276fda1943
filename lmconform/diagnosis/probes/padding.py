"""Is it the mask or the positions that padding upsets? Each is given from outside, and the place is looked up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.diagnosis.probes.places import along_time, first_difference, norm_over_time
from lmconform.specimen import random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

PADS = 5


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """One text with five pads on the left, with and without explicit positions; the pads' own tokens replaced."""
    import torch

    time = subject.longest(20)
    real = time - PADS
    generator = torch.Generator().manual_seed(seed)
    text = random_ids(subject.ordinary_ids, 1, real, generator).to(subject.device)
    pads = random_ids(subject.ordinary_ids, 2, PADS, generator).to(subject.device)
    one = torch.cat([pads[:1], text], dim=1)
    other = torch.cat([pads[1:], text], dim=1)
    mask = torch.ones_like(one)
    mask[:, :PADS] = 0
    positions = None
    if subject.convention.positions is not None:
        positions = subject.first_position + (mask.cumsum(-1) - 1).clamp(min=0)

    def tail(tensor: Tensor) -> Tensor | None:
        found = along_time(tensor, len(one), time, real)
        return None if found is None else found[:, -real:]

    alone = subject.logits(text)
    bound = tolerance.allowed(subject.noise, alone)

    def error(ids: Tensor, given: Tensor | None) -> float:
        return float((subject.logits(ids, mask=mask, positions=given)[:, -real:] - alone).abs().max())

    leaks = float(
        (
            subject.logits(one, mask=mask, positions=positions) - subject.logits(other, mask=mask, positions=positions)
        )[:, -real:].abs().max()
    )  # fmt: skip
    wrong, by_default = error(one, positions), error(one, None)
    if max(wrong, by_default) <= bound:
        return []
    place = first_difference(
        subject,
        (lambda: subject.logits(one, mask=mask, positions=positions), tail),
        (lambda: subject.logits(text), tail),
    )
    if leaks > bound and norm_over_time(subject, place, one):  # whatever attention's mask hides
        against = ("mask.padding_ignored", "mask.inverted", "position.ignores_mask")
        return [Finding(cause, Verdict.against) for cause in against]
    if leaks > bound:  # the pads' own tokens are seen: the mask does not hold
        changed = one.clone()
        changed[:, PADS:-1] = random_ids(subject.ordinary_ids, 1, real - 1, generator).to(subject.device)
        unmoved = subject.logits(one, mask=mask, positions=positions)
        moved = subject.logits(changed, mask=mask, positions=positions)
        blind = float((moved - unmoved)[:, -1].abs().max()) <= bound  # the last token does not see the real ones
        return [
            Finding("mask.inverted", Verdict.seen if blind else Verdict.against, place if blind else ""),
            Finding("mask.padding_ignored", Verdict.against if blind else Verdict.agrees, "" if blind else place),
            Finding("position.ignores_mask", Verdict.against),
        ]
    if positions is not None and wrong <= bound < by_default:
        positional = Finding(
            "position.ignores_mask",
            Verdict.cured,
            f"right with explicit position_ids ({wrong:.2g} off), wrong without ({by_default:.2g})",
        )
    else:
        positional = Finding("position.ignores_mask", Verdict.agrees, place)
    return [Finding("mask.padding_ignored", Verdict.against), positional]
