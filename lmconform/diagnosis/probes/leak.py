"""Where does the future come in: through attention's mask, or elsewhere? A causal mask is imposed from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.diagnosis.probes.imposed_mask import future_weights, imposed_causal_mask
from lmconform.diagnosis.probes.places import along_time, first_difference, norm_over_time
from lmconform.measuring.dropout import without_dropout
from lmconform.specimen import random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

MASKS = (
    "mask.missing", "mask.off_by_one", "mask.inverted", "mask.block_leak", "mask.soft", "mask.fast_path",
    "mask.train_only", "mask.query_offset",
)  # fmt: skip
SPREAD, FAINT = 0.9, 0.3  # of the later keys; of the weight of earlier ones


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """Replace the second half of a text and see what moves in the first, with and without a mask from outside.

    In eval mode without attention_mask and with one of all ones, then in train mode.
    """
    import torch

    time = subject.longest(24)
    generator = torch.Generator().manual_seed(seed)
    ids = random_ids(subject.ordinary_ids, 1, time, generator).to(subject.device)
    changed = ids.clone()
    half = time // 2
    changed[:, half:] = random_ids(subject.ordinary_ids, 1, time - half, generator).to(subject.device)
    ones = torch.ones_like(ids)

    def moved(specimen: Specimen = subject, mask: Tensor | None = None, train: bool = False) -> float:
        base, other = (specimen.logits(each, mask=mask, train=train) for each in (ids, changed))
        return float((base - other)[:, 3:half].abs().max()) / tolerance.allowed(subject.noise, base)

    def before(tensor: Tensor) -> Tensor | None:
        found = along_time(tensor, len(ids), time)
        return None if found is None else found[:, :half]

    leaks, padded = {"without attention_mask": moved()}, ones.clone()
    if subject.can("mask"):
        leaks["with attention_mask"] = moved(mask=ones)
        padded[:, :3] = 0
        leaks["with padding"] = moved(mask=padded)
    if max(leaks.values()) <= 1:
        return _in_training(subject, moved)
    first = next(kind for kind, ratio in leaks.items() if ratio > 1)
    mask = {"without attention_mask": None, "with attention_mask": ones}.get(first, padded)
    place = first_difference(
        subject,
        (lambda: subject.logits(ids, mask=mask), before),
        (lambda: subject.logits(changed, mask=mask), before),
    )
    one_sided = min(leaks.values()) <= 1
    leaking = " and ".join(kind for kind, ratio in leaks.items() if ratio > 1)
    path = Finding(
        "mask.fast_path",
        Verdict.seen if one_sided else Verdict.against,
        f"the leak is there only {leaking}" if one_sided else "",
    )
    found = [path, Finding("mask.train_only", Verdict.against), Finding("mask.query_offset", Verdict.against)]
    with future_weights() as noted:
        subject.logits(ids, mask=mask)
    if soft := [ratio for share, ratio in noted if share > SPREAD and ratio < FAINT]:
        where = f"later keys keep {max(soft):.2g} of the weight of earlier ones: lowered, not removed"
        found += [Finding("mask.soft", Verdict.seen, where), Finding("mask.missing", Verdict.against)]
    with imposed_causal_mask() as seen:
        after = moved(mask=mask)
    if not seen.count:
        return [*found, Finding("norm.over_sequence", Verdict.place, place)]
    if after > 1:  # the mask is not to blame: something else mixes over time
        against = [Finding(cause, Verdict.against) for cause in MASKS]
        if not norm_over_time(subject, place, ids):
            return [*against, Finding("norm.over_sequence", Verdict.agrees, place)]
        where = f"{place}: with later tokens its output at earlier ones changes, though its input there stays"
        return [*against, Finding("norm.over_sequence", Verdict.seen, where)]
    where = (
        f"{place}: with a causal mask imposed on its attention from outside, the leak falls from "
        f"{max(leaks.values()):.2g} to {after:.2g} times the bound"
        if place
        else ""
    )
    agree = [Finding(cause, Verdict.agrees, where) for cause in MASKS[:5]]
    return [*found, *agree, Finding("norm.over_sequence", Verdict.against)]


def _in_training(subject: Specimen, moved: Callable[..., float]) -> list[Finding]:
    """Eval mode is right: is train mode, and does a mask imposed from outside mend it?"""
    quiet = without_dropout(subject)
    before = moved(quiet, train=True)
    if before <= 1:
        return []
    with imposed_causal_mask() as seen:
        after = moved(quiet, train=True)
    if seen.count and after <= 1:
        where = (
            f"in train mode alone; with a causal mask imposed from outside the leak falls from {before:.2g} to "
            f"{after:.2g} times the bound"
        )
        return [Finding("mask.train_only", Verdict.cured, where), Finding("norm.over_sequence", Verdict.against)]
    where = "in train mode alone, and a causal mask imposed from outside does not mend it"
    return [Finding("norm.over_sequence", Verdict.agrees, where), Finding("mask.train_only", Verdict.against)]
