"""gradients: their norm over depth neither vanishes nor explodes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lmconform import charts, structure
from lmconform.context import Hint
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

VANISHED = 1e-6
UNEVEN = 10.0  # blocks of different kind differ tenfold; a residual stream that adds up grows in proportion to depth
OPENING_STEPS = 3  # a readout first, then a gate behind it, then what that gate shuts
OPENING_RMS = 0.02  # what a parameter that starts at 0 is moved by: the size of a usual weight


@register_check(
    "gradients.magnitude",
    holds="norms per layer neither vanish (1e-6) nor explode; ratio first to last layer bounded",
    requires=COMPARES_LOGITS,
)
def check_magnitude(subject: Specimen, ctx: Context) -> None:
    """Gradient of the cross-entropy against random labels, by block, on weights as the builder leaves them.

    A readout, an output projection or a gate that starts at 0 (muP, nanochat, LayerScale, ReZero, adaLN-zero) lets no
    gradient through until it has moved: where a block gets none at all, what starts at 0 is moved first, as an
    optimizer would, and the same bounds are applied then.
    """
    new = subject.fresh(subject.seed) if subject.can("rebuild") else subject.as_loaded()
    found = structure.blocks(new.module)
    if found is None or len(found[1]) < 2:
        ctx.not_applicable("needs two or more repeated blocks in an nn.ModuleList")
        raise AssertionError("unreachable")
    prefix, blocks = found
    ids, labels = ctx.ids(4, subject.longest(40)), ctx.ids(4, subject.longest(40), salt=3)
    if not all(any(p.requires_grad for p in block.parameters()) for block in blocks):
        ctx.not_applicable(f"not every block of {prefix} has trainable parameters")
    norms = norms_by_block(new.logits(ids, grad=True), labels, blocks)
    if norms is None:
        ctx.not_applicable(
            f"no parameter of {prefix} is on the way from the logits back: a tower of another modality, or a backward "
            "pass of its own; gradients.reach tells whether that is right"
        )
        raise AssertionError("unreachable")
    if 0.0 in norms and max(norms) < math.inf:
        norms = opened(ctx, new if subject.can("rebuild") else new.copy(), ids, labels, norms)
    ctx.record(charts.curves("Gradient norm by block", "block", "gradient norm", {"at the start": norms}, log="y"))
    profile = "gradient norms by block: " + " ".join(f"{norm:.3g}" for norm in norms)
    top, names = max(norms), [f"{prefix}.{index}" for index in range(len(norms))]
    for name, norm in zip(names, norms, strict=True):
        if not norm < float("inf"):
            ctx.fail("the gradient at initialisation is NaN or infinite", where=f"{name}; {profile}")
        ctx.within(
            top / norm if norm else float("inf"),
            1 / VANISHED,
            "the gradient vanishes in a block at initialisation (norm of the largest block over norm of this one)",
            where=f"{name}; {profile}",
            hint=Hint(
                "a saturated softmax or gate, a residual that is scaled away, or a block that is cut off by detach()",
                "grad.vanishing",
            ),
        )
    ratio = norms[0] / norms[-1]
    ctx.within(
        max(ratio, 1 / ratio),
        UNEVEN * len(norms),
        f"gradients {'explode' if ratio > 1 else 'vanish'} from the last block back to the first at initialisation "
        "(ratio of their norms)",
        where=profile,
        hint=Hint(
            "the residual stream is multiplied from block to block (a residual added twice or scaled), a norm is "
            "missing, or the first and last block start with very different weights",
            "grad.exploding",
            "scale.residual_growth",
        ),
    )
    ctx.note(profile)


# -- running backward ----------------------------------------------------------------------------------------------


def norms_by_block(logits: Tensor, labels: Tensor, blocks: Iterable[nn.Module]) -> list[float] | None:
    """Norm of the cross-entropy's gradient for each block's trainable parameters; None where it reaches no block."""
    import torch

    owners = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
    parameters = [p for owner in owners for p in owner]
    reached = torch.autograd.grad(_mean_loss(logits, labels), parameters, allow_unused=True)
    grads = dict(zip(map(id, parameters), reached, strict=True))
    if all(grad is None for grad in reached):
        return None
    squares = [[g.double().square().sum() for p in owner if (g := grads[id(p)]) is not None] for owner in owners]
    return [float(sum(terms)) ** 0.5 for terms in squares]


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [batch, time, vocab] against labels [batch, time], float64."""
    wide = logits.double()
    return (wide.logsumexp(-1) - wide.gather(-1, labels[..., None])[..., 0]).mean()


def opened(ctx: Context, model: Specimen, ids: Tensor, labels: Tensor, norms: list[float]) -> list[float]:
    """The norms by block once those parameters that are all 0 have followed their own gradient, a few steps at most.

    `norms` where that changes nothing: what stays at 0 gets no gradient itself. `model` is changed. The gain of a norm
    starts at 1, so one of 0 is left where it is.
    """
    import torch

    found = structure.blocks(model.module)
    assert found is not None
    of_norms = {
        id(p)
        for part in model.module.modules()
        if "norm" in type(part).__name__.lower()
        for p in part.parameters(False)
    }
    shut = {
        name: p
        for name, p in model.module.named_parameters()
        if p.requires_grad and p.numel() and id(p) not in of_norms and not bool(p.detach().any())
    }
    moved: list[str] = []
    for step in range(OPENING_STEPS if shut else 0):
        loss = _mean_loss(model.logits(ids, grad=True), labels)
        grads = torch.autograd.grad(loss, list(shut.values()), allow_unused=True)
        with torch.no_grad():
            for (name, parameter), grad in zip(shut.items(), grads, strict=True):
                size = 0.0 if grad is None else float(grad.float().square().mean().sqrt())
                if size and size < math.inf:
                    parameter.sub_(grad * (OPENING_RMS / size))
                    moved.append(name)
        now = norms_by_block(model.logits(ids, grad=True), labels, found[1])
        if now is not None and 0.0 not in now:
            names = list(dict.fromkeys(moved))
            ctx.note(
                f"at the start itself {norms.count(0.0)} of {len(norms)} blocks get a gradient of exactly 0, behind "
                f"parameters that start at 0; measured after {step + 1} step{'s' if step else ''} of "
                f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            )
            return now
    return norms
