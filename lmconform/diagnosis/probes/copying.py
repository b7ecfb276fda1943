"""Does a copy of the model share memory with it? Then whatever changes the copy changes the model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from lmconform.diagnosis.probes.finding import Finding, Verdict

if TYPE_CHECKING:
    from lmconform.specimen import Specimen


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """copy.deepcopy() of the module, by the addresses of its parameters and buffers."""
    module = subject.module
    copied = copy.deepcopy(module)
    own = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers()) if tensor.numel()}
    named = (*copied.named_parameters(), *copied.named_buffers())
    shared = [name for name, tensor in named if tensor.numel() and tensor.data_ptr() in own]
    if not shared:
        return _answers_with_the_original(subject)
    where = f"{shared[0]} of a deep copy is the original's own tensor: what the copy learns the original forgets"
    return [Finding("weights.not_saved", Verdict.cured, where), Finding("batch.cross_row", Verdict.against)]


def _answers_with_the_original(subject: Specimen) -> list[Finding]:
    """The copy's weights are changed: do its logits follow?"""
    import torch

    ids = subject.probe_ids()
    base = subject.logits(ids)
    copied = subject.copy()
    with torch.no_grad():
        for parameter in copied.module.parameters():
            parameter.mul_(1.5)
    if not torch.equal(copied.logits(ids), base):
        return []
    where = "other weights in a deep copy leave its logits as they were: it answers with the original's"
    return [Finding("weights.not_saved", Verdict.cured, where)]
