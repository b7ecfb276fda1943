"""Gradients differ from the reference's and logits do not: is it backward(), or a weight whose value hides the code?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.specimen import Unavailable, random_ids

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.specimen import Specimen

MOVED = 0.3  # of a weight's own size; of 1 where all of it is 0


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """All weights of both models are moved alike. A gain of 1 or a bias of 0 then shows how often and where it acts."""
    import torch

    if subject.reference is None or subject.reference.vocab_size != subject.vocab_size:
        raise Unavailable("no reference of this vocabulary")
    ours, theirs = subject.as_loaded().copy(), subject.reference.copy()
    mine, given = (dict(each.module.named_parameters()) for each in (ours, theirs))
    names = [name for name in given if name in mine and mine[name].shape == given[name].shape]
    ordinary = sorted(set(ours.ordinary_ids) & set(theirs.ordinary_ids))
    ids = random_ids(ordinary, 2, min(ours.longest(12), theirs.longest(12)), torch.Generator().manual_seed(seed))

    def apart() -> float:
        left, right = (each.logits(ids.to(each.device)).cpu() for each in (ours, theirs))
        bound = tolerance.allowed(max(subject.noise, theirs.noise), right)
        return float((left - right).abs().max()) / bound

    def differ(moved: list[str]) -> bool:
        kept = [(weight, weight.detach().clone()) for name in moved for weight in (mine[name], given[name])]
        for name in moved:
            _move(given[name], mine[name], seed)
        found = apart() > 1
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)
        return found

    if apart() > 1:
        return []
    if not differ(names):
        return [Finding("weights.used_otherwise", Verdict.against)]
    name = next((name for name in names if differ([name])), "")
    where = f"with {name or 'all weights'} moved alike in both, the logits differ: its value hid how it is used"
    return [Finding("weights.used_otherwise", Verdict.seen, where), Finding("grad.wrong", Verdict.ruled_out)]


def _move(weight: nn.Parameter, same: nn.Parameter, seed: int) -> None:
    """The same noise onto both."""
    import torch

    size = float(weight.detach().double().square().mean().sqrt()) or 1.0
    noise: Tensor = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * MOVED * size
    with torch.no_grad():
        for each in (weight, same):
            each.add_(noise.to(each))
