"""Which module first lets one row of a batch see another, and whether it is by their positions alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.diagnosis.probes.places import first_difference
from lmconform.specimen import random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """Rows of a batch of three, one of them replaced; then rows padded unequally, with positions given and not."""
    import torch

    time = subject.longest(20)
    generator = torch.Generator().manual_seed(seed)
    ids = random_ids(subject.ordinary_ids, 3, time, generator).to(subject.device)
    for replaced in (1, 0):
        changed = ids.clone()
        changed[replaced] = random_ids(subject.ordinary_ids, 1, time, generator).to(subject.device)
        kept = [row for row in range(3) if row != replaced]

        def rows(tensor: Tensor, kept: list[int] = kept) -> Tensor | None:
            return tensor[kept] if tensor.dim() >= 2 and tensor.shape[0] == 3 else None

        place = first_difference(
            subject,
            (lambda: subject.logits(ids), rows),
            (lambda changed=changed: subject.logits(changed), rows),  # type: ignore[misc]
        )
        if place:
            return [Finding("batch.cross_row", Verdict.seen, place), Finding("position.shared_row", Verdict.against)]
    return _positions(subject, ids)


def _positions(subject: Specimen, ids: Tensor) -> list[Finding]:
    """Unpadded rows are right: is it their positions that padded ones share?"""
    import torch

    if subject.convention.positions is None or not subject.can("mask"):
        return []
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        mask[row, : 5 * row] = 0
    given = subject.first_position + (mask.cumsum(-1) - 1).clamp(min=0)

    singly = torch.cat(
        [
            subject.logits(ids[row : row + 1], mask=mask[row : row + 1], positions=given[row : row + 1])
            for row in range(len(ids))
        ]
    )

    def error(positions: Tensor | None, order: list[int]) -> float:
        together = subject.logits(ids[order], mask=mask[order], positions=None if positions is None else given[order])
        return float((together - singly[order])[mask[order].bool()].abs().max())

    bound = tolerance.allowed(subject.noise, subject.logits(ids))
    alone = [
        subject.logits(ids[row : row + 1], mask=mask[row : row + 1])
        - subject.logits(ids[row : row + 1], mask=mask[row : row + 1], positions=given[row : row + 1])
        for row in range(len(ids))
    ]
    if float(torch.cat(alone)[mask.bool()].abs().max()) > bound:  # each row alone is placed otherwise, too
        return [Finding("position.shared_row", Verdict.against)]
    orders = ([0, 1, 2], [2, 1, 0])  # sharing positions errs in both; a mask that goes by the first row in one
    without = min(error(None, order) for order in orders)
    explicit = max(error(given, order) for order in orders)
    if explicit <= bound < without:
        where = f"with explicit position_ids in each row the rows agree: {explicit:.2g} off in place of {without:.2g}"
        return [Finding("position.shared_row", Verdict.cured, where), Finding("batch.cross_row", Verdict.against)]
    if explicit > bound:
        return [Finding("position.shared_row", Verdict.against)]
    return []
