"""causality, by gradients: a table of which embedding each position's logits depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmconform import charts
from lmconform.cases import Choice, Span
from lmconform.checks.block_kinds import SUBSET, states
from lmconform.checks.causality import known_leak
from lmconform.context import Hint
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen


@register_check(
    "causality.gradient",
    holds="d logits[t] / d embedding[s] is exactly 0 for s > t, and not 0 for s <= t inside the receptive field",
    needs=("embeds",),
    requires=COMPARES_LOGITS,
    space={"time": Span(1, 70), "mask": Choice("none", "ones")},
    grid=({"time": 36, "mask": "none"}, {"time": 20, "mask": "ones"}),
)
def check_gradient(subject: Specimen, ctx: Context) -> None:
    """One backward pass gives the whole table: row t of the batch asks for a projection of its logits at t.

    Values can hide a dependence that is multiplied by something tiny; a gradient that is not exactly 0 cannot. The
    other half of the table finds tokens that are never looked at. (Karpathy, "A Recipe for Training Neural
    Networks", 2019: "use backprop to chart dependencies".)
    """
    import torch

    for case in ctx.cases():
        if case.mask != "none" and not subject.can("mask"):
            continue
        time = subject.longest(case.time)
        ids = ctx.ids(1, time)
        projection = torch.randn(subject.vocab_size, generator=ctx.generator(time)).to(ids.device)
        table = dependence(subject, ctx, ids, projection, range(time), with_mask=case.mask == "ones")
        if bool(table.triu(1).any()):  # row by row, so that rows that touch each other are not taken for a leak
            table = torch.cat(
                [dependence(subject, ctx, ids, projection, [t], with_mask=case.mask == "ones") for t in range(time)]
            )
        where = f"mask {case.mask}"
        ctx.record(
            charts.table(
                "Which token each position feels", "token s", "logits at t", table.tolist(), future=True, case=str(case)
            )
        )
        ahead = table.triu(1)
        worst = divmod(int(ahead.argmax()), time)
        ctx.within(
            float(ahead.max()),
            0.0,
            "the gradient of logits[t] with respect to a later embedding[s] is not 0",
            where=f"{where}, t {worst[0]}, s {worst[1]}",
            hint=known_leak(subject)
            or Hint(
                "token s > t takes part in computing logits[t]: a soft or missing causal mask, or a layer that mixes "
                "over time (a norm over the sequence, a convolution padded on both sides)",
                "mask.soft",
                "mask.missing",
                "mixer.not_causal",
            ),
        )
        if chosen := next((name for name in SUBSET if states(subject.config, name)), None):
            ctx.note(f"whether every earlier token is felt was not asked: attention chooses among them ({chosen})")
            continue
        field = torch.ones_like(table, dtype=torch.bool).tril()
        if subject.window is not None:
            field &= torch.ones_like(field).triu(1 - subject.window)
        unseen = (field & (table == 0)).nonzero()
        if len(unseen):
            t, s = unseen[-1].tolist()
            ctx.fail(
                f"{len(unseen)} of {int(field.sum())} gradients of logits[t] with respect to embedding[s], s <= t, "
                "are exactly 0: these tokens cannot influence what comes after them",
                where=f"{where}, t {t}, s {s}",
                hint=blind_hint(table, field),
            )


def dependence(
    subject: Specimen, ctx: Context, ids: Tensor, projection: Tensor, asked: Sequence[int], *, with_mask: bool
) -> Tensor:
    """[asked, s]: how strongly a projection of logits[t] depends on embedding[s], one row for each t asked."""
    import torch

    rows, time = len(asked), ids.shape[1]
    with torch.no_grad():
        embeds = subject.embed(ids.expand(rows, time).contiguous())
    embeds = embeds.detach().clone().requires_grad_(True)
    mask = ids.new_ones(rows, time) if with_mask else None
    # a copy is given: a model that scales inputs_embeds in place must not stumble over a leaf
    logits = subject.logits(embeds=embeds.clone(), mask=mask, grad=True)
    if not logits.requires_grad:
        ctx.fail(
            "logits carry no gradient back to inputs_embeds",
            hint=Hint(
                "the forward pass detaches: no_grad(), detach(), .data or a round trip through numpy",
                "grad.wrong",
                "grad.dead_parameter",
            ),
        )
    at = torch.tensor(list(asked), device=logits.device)
    total = (logits[torch.arange(rows, device=logits.device), at] @ projection.to(logits)).sum()
    (gradient,) = torch.autograd.grad(total, embeds, allow_unused=True)
    if gradient is None:
        ctx.fail(
            "logits do not depend on inputs_embeds",
            hint=Hint("inputs_embeds is taken by forward() and then ignored", "embeds.path_differs"),
        )
    return gradient.abs().amax(dim=-1)


def blind_hint(table: Tensor, field: Tensor) -> str:
    """Why tokens go unseen, read off the table of gradients [t, s]."""
    import torch

    steps = torch.arange(len(table), device=table.device)
    distance = steps[:, None] - steps
    nearest = int(distance[field & (table == 0)].min())
    farthest = int(distance[field & (table != 0)].max()) if bool((field & (table != 0)).any()) else -1
    if farthest <= 0:
        return Hint(
            "no position depends on any other: attention is switched off (a gate at 0, a projection of zeros), or keys "
            "and values are detached on their way",
            "attention.gated_off",
            "grad.wrong",
        )
    if farthest < nearest:
        return Hint(
            f"no position sees further back than {farthest} tokens: a sliding window or chunk that no config states, "
            "or a mask that is cut too narrow",
            "mask.window",
        )
    return Hint(
        "the mask hides too much, attention is saturated (unscaled scores), or a part of the path is detached",
        "mask.window",
        "mask.inverted",
        "attention.unscaled",
    )
