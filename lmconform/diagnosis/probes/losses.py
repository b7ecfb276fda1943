"""The loss is not the cross-entropy of the logits: is it that of logits in a half type?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.specimen import Unavailable, random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

CLOSE = 0.1  # of the error to be explained, which rounded logits must leave


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """The model's loss against cross-entropy over logits that were rounded to bfloat16 or float16 first."""
    import torch

    if not subject.can("labels"):
        raise Unavailable("no labels")
    ids = random_ids(subject.ordinary_ids, 3, subject.longest(20), torch.Generator().manual_seed(seed))
    ids = ids.to(subject.device)
    output = subject.forward(ids, labels=ids)
    if output.loss is None or output.logits.dtype != torch.float32:
        return []
    given, logits, labels = float(output.loss), output.logits, ids
    if subject.convention.labels_shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]

    def error(those: Tensor) -> float:
        return abs(given - float(torch.nn.functional.cross_entropy(those.flatten(0, 1), labels.flatten())))

    before = error(logits.double())
    if before <= torch.finfo(torch.float32).eps * 32 * given:  # right here, wrong for other labels
        return []
    for dtype in (torch.bfloat16, torch.float16):
        rounded = logits.to(dtype)
        after = min(error(rounded), error(rounded.float()))
        if after <= CLOSE * before:
            name = str(dtype).removeprefix("torch.")
            where = f"of logits in {name} it is the cross-entropy: {after:.2g} off in place of {before:.2g}"
            others = ("loss.normalisation", "loss.ignore_index", "loss.smoothing_wrong")
            return [Finding("dtype.hard_coded", Verdict.cured, where), *(Finding(c, Verdict.against) for c in others)]
    return []
