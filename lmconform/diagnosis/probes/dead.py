"""Blocks that learn nothing: because forward() leaves them out, or because nothing but zeros comes in?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform import structure
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.specimen import random_ids

if TYPE_CHECKING:
    from lmconform.specimen import Specimen


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """One backward through the model as it was loaded: which blocks have no part in the logits."""
    import torch

    loaded = subject.as_loaded()
    found = structure.blocks(loaded.module)
    if found is None:
        return []
    named = [
        (f"{found[0]}.{number}", [weight for weight in block.parameters() if weight.requires_grad])
        for number, block in enumerate(found[1])
    ]
    weights = [weight for _, own in named for weight in own]
    ids = random_ids(loaded.ordinary_ids, 2, loaded.longest(12), torch.Generator().manual_seed(seed))
    logits = loaded.forward(ids.to(loaded.device), grad=True).logits
    if not weights or not logits.requires_grad:
        return []
    targets = ids[:, 1:].to(loaded.device).flatten()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    moved = {id(weight): bool(grad.any()) for weight, grad in zip(weights, gradients) if grad is not None}
    unused = [name for name, own in named if own and not any(id(weight) in moved for weight in own)]
    if unused:
        rest = [own for name, own in named if own and name not in unused]
        vanished = any(not any(moved.get(id(weight)) for weight in own) for own in rest)
        where = f"{', '.join(unused)}: forward() uses none of its parameters"
        vanishing = Finding("grad.vanishing", Verdict.against if vanished else Verdict.ruled_out)
        return [Finding("grad.dead_parameter", Verdict.seen, where), vanishing]
    table = getattr(structure.embedding(loaded.module, loaded.vocab_size), "weight", None)
    if any(moved.values()) or not isinstance(table, torch.Tensor) or bool(table.any()):
        return []
    where = "the embedding is 0 in every place: so are hidden states, and the gradient of every block"
    return [Finding("grad.vanishing", Verdict.seen, where), Finding("init.residual_scaling", Verdict.ruled_out)]
