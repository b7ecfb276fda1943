"""Is there attention at all? Without it no mask of attention is at fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform.diagnosis.catalogue import catalogue
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.measuring.attending import may_attend

if TYPE_CHECKING:
    from lmconform.specimen import Specimen

ANY_MIXER = {"mask.padding_ignored"}  # a recurrence has to leave padding out as well


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """In one forward: whether anything that a causal mask belongs to was met."""
    if may_attend(subject):
        return []
    masks = (cause for cause in catalogue() if cause.startswith("mask.") and cause not in ANY_MIXER)
    return [Finding(cause, Verdict.ruled_out) for cause in masks]
