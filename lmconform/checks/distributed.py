"""distributed: several processes that train one model compute what one process computes, and stay the same model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.context import Hint
from lmconform.measuring.ranks import measure_together
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen


@register_check(
    "distributed.ddp",
    holds="two ranks give one rank's gradients under DistributedDataParallel; replicas stay equal; uneven labels too",
    needs=("processes",),
    requires=COMPARES_LOGITS,
    profile="thorough",
)
def check_ddp(subject: Specimen, ctx: Context) -> None:
    """Two processes on gloo, each built under a seed of its own: DDP's broadcast must make them equal.

    Gradients of a batch split over the ranks equal those of the whole batch in one process, with as many labels on
    every rank and with very different numbers (a loop weights a rank's mean loss by its share of the labels; a model
    that takes num_items_in_batch is told the number in all ranks). After three AdamW steps on different data every
    parameter, every buffer and the logits are the same, bit for bit.

    `torchrun --nproc-per-node N -m lmconform check SPEC --select distributed` measures in torchrun's own processes
    (nccl on CUDA). Source: PyTorch's DDP design note; transformers issue 34242 on means of unequal label counts.
    """
    found = measure_together(subject, ctx, "ddp")
    _same_replicas(ctx, found["apart_at_start"], "after DDP has broadcast rank 0's weights", start=True)
    _same_gradients(subject, ctx, found, "DistributedDataParallel")
    _same_replicas(ctx, found["apart_after_steps"], "after 3 optimizer steps", start=False)
    if found["unused"]:
        first = found["unused"][0]
        ctx.note(f"DDP needs find_unused_parameters=True: {first} gets no gradient from the loss")


@register_check(
    "distributed.fsdp",
    holds="two ranks give one rank's gradients under FSDP2 (fully_shard); the gathered weights are one process's; "
    "uneven labels too",
    needs=("processes",),
    requires=COMPARES_LOGITS,
    profile="thorough",
)
def check_fsdp(subject: Specimen, ctx: Context) -> None:
    """Every block and the whole are sharded over two processes on gloo; gradients as in distributed.ddp.

    After three SGD steps the weights are gathered and loaded into a model of one process: a resume under another world
    size. Its logits equal those under FSDP and those of a run that never was distributed.
    """
    from importlib.util import find_spec

    if find_spec("torch.distributed.fsdp") is None:
        ctx.not_applicable("this torch has no torch.distributed.fsdp")
    found = measure_together(subject, ctx, "fsdp")
    _same_gradients(subject, ctx, found, "fully_shard")
    if found["missing"]:
        ctx.fail(
            f"{found['missing'][0]} is missing from the weights that were gathered from all ranks",
            where=found["missing"][0],
            hint=Hint("state_dict() is overridden, or a tensor is added after sharding", "weights.not_saved"),
        )  # fmt: skip
    resumed = found["resumed"]
    ctx.equal(
        resumed["loaded"].to(subject.dtype),
        resumed["sharded"].to(subject.dtype),
        "weights gathered from all ranks and loaded into one process give other logits than the sharded model",
        hint=Hint(
            "something that decides the logits is not in the state dict, or is kept per rank",
            "distributed.replicas_diverge",
        ),
    )
    drift = (
        tolerance.allowed(subject.noise, resumed["single"].to(subject.dtype)) * 4
    )  # three steps' rounding, and the first
    ctx.equal(
        resumed["sharded"].to(subject.dtype),
        resumed["single"].to(subject.dtype),
        "after 3 optimizer steps the sharded model's logits differ from those of one process that saw the same batches",
        hint=Hint(
            "a weight is updated on one rank only, or its gradient is not reduced", "distributed.replicas_diverge"
        ),
        allowed=drift,
    )


# -- judging -------------------------------------------------------------------------------------------------------


def _same_gradients(subject: Specimen, ctx: Context, found: dict[str, Any], how: str) -> None:
    for name in ("even", "uneven"):
        whole, floor = found["whole"][name], found["floor"][name]
        bounds = _bounds(subject, whole, floor, found["size"])
        tried = {key: grads for key, grads in found["actual"].items() if key.split()[0] == name}
        offered = [key for key in tried if key.endswith(" items")]
        # a model that is told the number of labels answers for it; one that is not is weighted by the loop, or has
        # summed over all ranks by itself
        judged = offered or list(tried)
        worst = {key: _worst(tried[key], whole, bounds) for key in judged}
        best = min(judged, key=lambda key: worst[key][0])
        ratio, parameter = worst[best]
        if not ratio <= 1 or parameter not in tried[best]:
            _blame(ctx, name, how, best, tried[best], whole, parameter, bounds[parameter], items=bool(offered))
        measured = ratio * bounds[parameter]
        ctx.within(measured, bounds[parameter], "gradients of two ranks differ", where=f"{parameter}, {name} labels")
        if name == "uneven" and best.endswith(" share") and subject.convention.labels is not None:
            ctx.note("its loss is the mean over a rank's own labels: a loop must weight it by the rank's share of them")


def _blame(
    ctx: Context, name: str, how: str, key: str, actual: dict[str, Tensor], whole: dict[str, Tensor], parameter: str,
    bound: float, *, items: bool,
) -> None:  # fmt: skip
    import torch

    expected = whole[parameter].double()
    got = actual.get(parameter)
    got_ = torch.zeros_like(expected) if got is None else got.double()
    length = float(got_.norm() / expected.norm().clamp(min=1e-300))
    measured = float((got_ - expected).abs().max())
    given = {"mean": "", "share": ", each rank's mean weighted by its share", "items": ", num_items_in_batch given"}
    if name == "uneven":
        message = f"gradients of two ranks with uneven numbers of labels differ from one process's under {how}"
        hint = (
            Hint(
                "num_items_in_batch is the number of labels in all ranks: the loss is the sum over the rank's labels "
                "divided by it, and not divided again by its own count",
                "distributed.rank_accumulation",
            )
            if items
            else Hint(
                "the loss is neither a mean over the rank's labels nor summed over all ranks' labels and multiplied "
                "by the number of ranks (DDP averages gradients): a mean of means, or a missing factor",
                "distributed.rank_accumulation",
            )
        )
    else:
        message = f"gradients of two ranks differ from one process's under {how}"
        scaled = float((got_ - length * expected).norm()) < 0.01 * length * float(expected.norm())
        hint = Hint(
            "a parameter is left out of the reduction (_ddp_params_and_buffers_to_ignore, made after wrapping, used "
            "outside forward), the loss is scaled by the world size, or statistics of the batch enter the model",
            *(("distributed.rank_accumulation",) if scaled else ()),
            "distributed.replicas_diverge",
        )
    ctx.fail(
        message, measured=measured, allowed=bound, hint=hint,
        where=f"{parameter}: {length:.3g} times as long as one process's ({name} labels{given[key.split()[1]]})",
    )  # fmt: skip


def _bounds(subject: Specimen, whole: dict[str, Tensor], floor: dict[str, Tensor], size: float) -> dict[str, float]:
    """What rounding may do to each gradient: the change under another order of rows, and the noise of the logits."""
    relative = max(subject.noise, tolerance.epsilon(subject.dtype) * max(size, 1.0))
    top = max((float(grad.abs().max()) for grad in whole.values() if grad.numel()), default=0.0)
    return {
        name: tolerance.FACTOR
        * max(
            float((grad.double() - floor[name].double()).abs().max()) if name in floor and grad.numel() else 0.0,
            relative * max(float(grad.abs().max()) if grad.numel() else 0.0, 1e-3 * top),
        )
        for name, grad in whole.items()
    }


def _worst(actual: dict[str, Tensor], whole: dict[str, Tensor], bounds: dict[str, float]) -> tuple[float, str]:
    """The largest difference over its bound, and the parameter; a missing gradient counts as zero."""
    ratios = {
        name: float((actual[name].double() - grad.double()).abs().max() if name in actual else grad.abs().max())
        / max(bounds[name], 1e-300)
        for name, grad in whole.items()
        if grad.numel()
    }
    name = max(ratios, key=lambda each: ratios[each] if ratios[each] == ratios[each] else float("inf"))
    return ratios[name], name


def _same_replicas(ctx: Context, apart: dict[str, float], when: str, *, start: bool) -> None:
    differing = {name: value for name, value in apart.items() if value != 0}
    tensors = [name for name in differing if name != "logits"]
    if tensors:
        ctx.fail(
            f"the ranks hold different weights or buffers {when}: {', '.join(tensors[:3])}",
            measured=differing[tensors[0]],
            allowed=0.0,
            where=tensors[0],
            hint=Hint(
                "it is not broadcast (_ddp_params_and_buffers_to_ignore, or made later)", "distributed.replicas_diverge"
            )
            if start
            else Hint(
                "each rank updates it from its own data: statistics need an all_reduce (SyncBatchNorm), parameters a "
                "reduced gradient; DDP copies rank 0's buffers only when the next forward begins",
                "distributed.replicas_diverge",
            ),
        )
    if differing:
        ctx.fail(
            f"the ranks hold the same weights and give different logits {when}",
            measured=differing["logits"],
            allowed=0.0,
            hint=Hint(
                "something drawn at random or counted by each rank is neither a parameter nor a buffer, so nothing "
                "broadcasts it: register it as a buffer",
                "distributed.replicas_diverge",
            ),
        )
