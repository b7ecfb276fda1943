"""Which module first lets one row of a batch see another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform.diagnosis.probes.places import first_difference
from lmconform.specimen import random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen


def probe(subject: Specimen, seed: int) -> dict[str, tuple[float, str]]:
    """Rows 0 and 2 of a batch of three, the row between them replaced."""
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
            return {"batch.cross_row": (0.5, place)}
    return {}
