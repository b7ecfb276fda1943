"""embeds: inputs_embeds is another way of giving the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform.cases import Choice, Span
from lmconform.checks.padding import mask_for
from lmconform.context import Hint
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from lmconform.context import Context
    from lmconform.specimen import Specimen


@register_check(
    "embeds.equal",
    holds="inputs_embeds equals input_ids, for time 1 and up, cached too",
    needs=("embeds",),
    requires=COMPARES_LOGITS,
    profile="smoke",
    space={"batch": Span(1, 3), "time": Span(1, 64), "past": Span(0, 64), "mask": Choice("none", "ones", "padded")},
    grid=(
        {"batch": 1, "time": 1, "past": 0, "mask": "none"},
        {"batch": 2, "time": 40, "past": 0, "mask": "none"},
        {"batch": 2, "time": 9, "past": 0, "mask": "padded"},
        {"batch": 2, "time": 1, "past": 20, "mask": "none"},
        {"batch": 2, "time": 3, "past": 14, "mask": "ones"},
    ),
)
def check_equal(subject: Specimen, ctx: Context) -> None:
    """The token embedding's own rows are given as inputs_embeds, alone, left-padded and on a cache made from ids."""
    import torch

    for case in ctx.cases():
        past = case.past if subject.can("cache") else 0
        total = subject.longest(past + case.time)
        past = min(past, total - 1)
        ids = ctx.ids(case.batch, total)
        given = torch.ones_like(ids) if case.mask != "none" and subject.can("mask") else None
        if given is not None and case.mask == "padded":
            given[0, : min(3, total - 1)] = 0  # the first row is left-padded
        rest = ids[:, past:]
        with torch.no_grad():
            embeds = subject.embed(rest)
        if not past:
            by_ids = subject.logits(rest, mask=given)
            by_embeds = subject.logits(embeds=embeds, mask=given)
        else:
            # two prefixes, not one cache twice: a Cache object is changed by the first call
            before = None if given is None else given[:, :past]
            caches = [subject.forward(ids[:, :past], mask=before, use_cache=True).cache for _ in range(2)]
            given = None if given is None else mask_for(subject, given, rest.shape[1])
            by_ids = subject.logits(rest, mask=given, cache=caches[0], use_cache=True)
            by_embeds = subject.logits(embeds=embeds, mask=given, cache=caches[1], use_cache=True)
        if given is not None:  # what comes out at padding means nothing
            by_ids, by_embeds = (out * given[:, -rest.shape[1] :, None] for out in (by_ids, by_embeds))
        ctx.equal(
            by_embeds,
            by_ids,
            "logits of inputs_embeds differ from those of the input_ids they stand for" + " on a cache" * (past > 0),
            where=f"{rest.shape[1]} tokens after {past} cached ones" if past else f"{rest.shape[1]} tokens",
            hint=Hint(
                "whatever is done to the token embeddings (scale, positions, dropout, normalisation, a sequence "
                "length or a mask read from input_ids) must be done on both paths: look at the branch on inputs_embeds",
                "embeds.path_differs",
            ),
        )
