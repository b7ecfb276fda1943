"""Where does the future come in: through attention's mask, or elsewhere? A causal mask is imposed from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.diagnosis.probes.imposed_mask import imposed_causal_mask
from lmconform.diagnosis.probes.places import first_difference
from lmconform.specimen import random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

MASKS = (
    "mask.missing", "mask.off_by_one", "mask.inverted", "mask.block_leak", "mask.soft", "mask.fast_path",
    "mask.train_only", "mask.query_offset",
)  # fmt: skip
AGREES, SPEAKS_AGAINST = 0.8, -1.5


def probe(subject: Specimen, seed: int) -> dict[str, tuple[float, str]]:
    """Replace the second half of a text and see what moves in the first, with and without a mask from outside."""
    import torch

    time = subject.longest(24)
    generator = torch.Generator().manual_seed(seed)
    ids = random_ids(subject.ordinary_ids, 1, time, generator).to(subject.device)
    changed = ids.clone()
    half = time // 2
    changed[:, half:] = random_ids(subject.ordinary_ids, 1, time - half, generator).to(subject.device)

    def moved() -> bool:
        base, other = subject.logits(ids), subject.logits(changed)
        floor = tolerance.allowed(subject.noise, base)
        return float((base - other)[:, :half].abs().max()) > floor

    def before(tensor: Tensor) -> Tensor | None:
        return tensor[:, :half] if tensor.dim() >= 2 and tensor.shape[1] == time else None

    if not moved():
        return {}
    place = first_difference(subject, (lambda: subject.logits(ids), before), (lambda: subject.logits(changed), before))
    with imposed_causal_mask() as seen:
        still = moved()
    if not seen.count:
        return {"norm.over_sequence": (0.0, place)}
    if still:  # the mask is not to blame: something else mixes over time
        return {cause: (SPEAKS_AGAINST, "") for cause in MASKS} | {"norm.over_sequence": (AGREES, place)}
    where = f"{place}: with a causal mask imposed on its attention from outside, the leak is gone" if place else ""
    return {cause: (AGREES, where) for cause in MASKS} | {"norm.over_sequence": (SPEAKS_AGAINST, "")}
