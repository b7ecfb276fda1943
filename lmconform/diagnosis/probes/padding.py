"""Is it the mask or the positions that padding upsets? Each is given from outside, and the place is looked up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.diagnosis.probes.places import first_difference
from lmconform.specimen import random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

PADS = 5


def probe(subject: Specimen, seed: int) -> dict[str, tuple[float, str]]:
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
        return tensor[:, -real:] if tensor.dim() >= 2 and tensor.shape[1] in (time, real) else None

    alone = subject.logits(text)
    bound = tolerance.allowed(subject.noise, alone)

    def error(ids: Tensor, given: Tensor | None) -> float:
        return float((subject.logits(ids, mask=mask, positions=given)[:, -real:] - alone).abs().max())

    leaks = float(
        (
            subject.logits(one, mask=mask, positions=positions) - subject.logits(other, mask=mask, positions=positions)
        )[:, -real:].abs().max()
    )  # fmt: skip
    place = first_difference(
        subject,
        (lambda: subject.logits(one, mask=mask, positions=positions), tail),
        (lambda: subject.logits(text), tail),
    )
    if leaks > bound:  # the pads' own tokens are seen: the mask does not hold
        return {"mask.padding_ignored": (1.2, place), "position.ignores_mask": (-1.0, "")}
    found = {"mask.padding_ignored": (-1.5, ""), "position.ignores_mask": (0.8, place)}
    if positions is not None and error(one, positions) <= bound < error(one, None):
        found["position.ignores_mask"] = (1.5, "right with explicit position_ids, wrong without")
    return found
