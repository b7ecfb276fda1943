"""Does generate() append the tokens that it chose, or something else in their place?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.measuring.generating import Generator
from lmconform.specimen import random_ids

if TYPE_CHECKING:
    from lmconform.specimen import Specimen

PROMPTS = 12
FEW = 8  # places of a list of the likeliest tokens


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """The first new token after a dozen prompts, greedily, against the likeliest by forward()."""
    import torch

    ids = random_ids(subject.ordinary_ids, PROMPTS, 6, torch.Generator().manual_seed(seed)).to(subject.device)
    right = subject.logits(ids)[:, -1].argmax(-1)
    generator = Generator(subject)
    mask = torch.ones_like(ids) if generator.offers("attention_mask") else None
    made = generator.greedy(ids, 1, mask=mask)[:, 0]
    if torch.equal(made, right):  # wrong later on: it is what forward() is given
        others = ("generation.ids_out_of_vocab", "generation.control_wrong")
        return [Finding("generation.inputs_differ", Verdict.agrees), *(Finding(c, Verdict.against) for c in others)]
    offsets = (made - right).unique()
    if len(offsets) == 1:
        where = f"every token is the likeliest one plus {int(offsets[0])}"
    elif bool((made < FEW).all()) and not bool((right < FEW).all()):
        where = f"every first token is below {FEW}, and the likeliest are not: places in a list, not tokens"
    else:
        return []
    return [
        Finding("generation.ids_out_of_vocab", Verdict.seen, where),
        Finding("generation.inputs_differ", Verdict.against),
    ]
