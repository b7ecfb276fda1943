"""parity: the model learns what its reference learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.checks.parity import both, columns_of, shared_ids
from lmconform.context import Hint
from lmconform.measuring.pairing import Pair, pair_parameters
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen


@register_check(
    "parity.gradients",
    holds="gradients equal the reference's within the dtype's tolerance",
    needs=("ref",),
    requires=(*COMPARES_LOGITS, "parity.logits"),
)
def check_gradients(subject: Specimen, ctx: Context) -> None:
    """Gradients of one cross-entropy, computed outside the models, at every weight that was found in both.

    Equal logits with unequal gradients mean a value that was detached, computed under no_grad, or rounded on the way.
    """
    ours, theirs = both(subject)
    columns = columns_of(ctx, ours, theirs)
    ids = shared_ids(ctx, ours, theirs, 3, 24)
    pairs = [pair for pair in pair_parameters(ours.module, theirs.module) if pair.links and pair.found == 1.0]
    if not pairs:
        ctx.not_applicable("none of the reference's weights is found in the model; see parity.transfer")
    mine, my_noise = _gradients(ours, ids, columns)
    expected, their_noise = _gradients(theirs, ids, columns)
    largest = max(float(g.abs().max()) for g in expected.values())
    sharing: dict[str, list[Pair]] = {}
    for pair in pairs:
        for link in pair.links:
            sharing.setdefault(link.subject, []).append(pair)
    for pair in reversed(pairs):  # from the head down: the first that differs lies just before the fault
        group = sharing[pair.links[0].subject]
        if any(len(sharing[link.subject]) > 1 for link in pair.links) and not _disjoint(pair, sharing):
            ctx.note(f"{pair.reference} shares its place with {', '.join(p.reference for p in group if p is not pair)}")
            continue  # tied on one side only: the sum of several gradients
        target = expected[pair.reference]
        options = [
            sum((link.collect(mine[link.subject], target.shape) for link in links), target.new_zeros(()))
            for links in pair.options
        ]
        best = min(range(len(options)), key=lambda i: float((options[i] - target).abs().max()))
        noise = max(
            their_noise[pair.reference],
            *(my_noise[link.subject] for link in pair.options[best]),
            tolerance.epsilon(ours.dtype) * max(float(target.abs().max()), 0.01 * largest),
        )
        names = ", ".join(link.subject for link in pair.options[best])
        ctx.equal(
            options[best],
            target,
            "the gradient differs from the reference's",
            where=f"{pair.reference} (here: {names})",
            allowed=tolerance.FACTOR * noise,
            axes=("row", "column"),
            hint=Hint(
                "logits that agree where gradients do not: something on the way is detached, computed under "
                "no_grad(), or its parameter is used in two places",
                "grad.wrong",
            ),
        )


def _disjoint(pair: Pair, sharing: dict[str, list[Pair]]) -> bool:
    """Whether other weights in the same tensors lie elsewhere in them, as q, k and v in a fused matrix do."""
    for link in pair.links:
        for other in sharing[link.subject]:
            for theirs in other.links:
                if other is pair or theirs.subject != link.subject:
                    continue
                if theirs.subject_axis != link.subject_axis or bool(((theirs.index >= 0) & (link.index >= 0)).any()):
                    return False
    return True


def _gradients(specimen: Specimen, ids: Tensor, columns: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients by parameter name, float64 on the CPU, and what rounding does to each."""
    made = _backward(specimen, ids, columns)
    other = _backward(tolerance.other_rounding(specimen), ids, columns)
    return made, {name: float((made[name] - other[name]).abs().max()) for name in made}


def _backward(specimen: Specimen, ids: Tensor, columns: int) -> dict[str, Tensor]:
    import torch

    copied = specimen.copy()
    for parameter in copied.module.parameters():
        parameter.requires_grad_(True).grad = None
    ids = ids.to(specimen.device)
    with torch.enable_grad():
        logits = copied.logits(ids, grad=True)[..., :columns]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
    return {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).detach().cpu().double()
        for name, p in copied.module.named_parameters()
    }
