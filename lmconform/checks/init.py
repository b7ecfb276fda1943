"""init: weights as the builder leaves them start near ln(vocab), at a sane scale, and from the seed."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lmconform import structure
from lmconform.context import Hint
from lmconform.measuring import traces
from lmconform.measuring.seeding import builders_seed_left_out
from lmconform.registry import register_check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

NAT = 1.0
DOUBT = 3.0  # standard errors of the mean over the tokens that were drawn
UNIT = 1.0  # the size that a normed vector has
FAINT = 1e-4  # its square vanishes beside every norm's epsilon (1e-8 and more): such a stream is noise
SCORE_TIME = 37  # a length that is no other size
EVEN = 2.0  # times by which a block that is not at fault makes the stream larger at most
ASIDE = 0.1  # of what the block at fault adds: what any other may add

ONE_BLOCK = Hint(
    "one block's output is out of scale: its initialisation, a scale factor applied twice, or a missing norm",
    "scale.hidden",
    "init.residual_scaling",
)
EVERY_BLOCK = Hint(
    "the projections that write to the residual start too large (GPT-2 divides them by sqrt(2 * layers)), a norm is "
    "missing, or the residual is added twice",
    "init.residual_scaling",
)


@register_check(
    "init.loss",
    holds="at initialisation, labels drawn independently of the input, loss is within 1 nat of ln(vocab)",
    needs=("rebuild",),
    requires=("contract.shape",),
    profile="smoke",
)
def check_loss(subject: Specimen, ctx: Context) -> None:
    """The mean over labels is taken exactly: logsumexp minus the mean logit, at every position.

    What the choice of input tokens adds is measured too, and allowed for beyond the 1 nat. An untrained model knows
    nothing, so it should bet on nothing: more than ln(vocab) means logits that are too large.

    Source: Karpathy, "A Recipe for Training Neural Networks" (2019), "verify loss @ init".
    """
    import torch

    new = newly_built(subject, ctx)
    ids = ctx.ids(4, subject.longest(64))
    logits = new.logits(ids).double()
    if not bool(logits.isfinite().all()):
        ctx.fail("logits of the newly built model are NaN or infinite", hint="a parameter was left uninitialised")
    each = logits.logsumexp(-1) - logits.mean(-1)
    loss, expected = float(each.mean()), math.log(subject.vocab_size)
    worst = divmod(int(each.argmax()), each.shape[1])
    by_token = torch.stack([each[ids == token].mean() for token in ids.unique()])
    error = float(by_token.std()) / len(by_token) ** 0.5 if len(by_token) > 1 else 0.0
    ctx.within(
        loss - expected, NAT + DOUBT * error,
        f"loss at initialisation is above ln({subject.vocab_size}) = {expected:.3f} by more than {NAT:g} nat",
        where=f"loss {loss:.3f}, logits' standard deviation {float(logits.std()):.3g}, worst at row {worst[0]}, "
        f"position {worst[1]}",
        hint=loss_hint(logits, ids),
    )  # fmt: skip


@register_check(
    "init.scale",
    holds="logits, hidden and attention scores have sane variance; residual growth over depth bounded",
    needs=("rebuild",),
    requires=("contract.shape",),
)
def check_scale(subject: Specimen, ctx: Context) -> None:
    """Each bound has a reason, none is tuned.

    Hidden states: no larger than if each of two sub-layers a block added a vector of unit size (what a norm gives),
    all in one direction, so growth over depth is linear at most. Attention: the spread of the scores among n keys at
    which a softmax of normal scores is left with about one key, sqrt(ln n). Logits: the spread that costs 1 nat.
    """
    new = newly_built(subject, ctx)
    ids = ctx.ids(4, subject.longest(SCORE_TIME))
    trace = traces.stream(new, ids)
    if trace is not None:
        check_stream(ctx, trace)
    scores = traces.attention_scores(new, ids)
    for found in scores:
        keys = int(found.visible.sum(-1).max())
        spread = content_spread(found)
        if keys < 8 or not math.isfinite(spread):
            continue
        ctx.within(
            spread, math.log(keys) ** 0.5,
            "attention scores spread so far at initialisation that each row of the softmax sees one key",
            where=f"block {found.block}" if found.block >= 0 else "",
            hint=Hint("the projections of queries and keys start too large, or the scores are not divided by "
            "sqrt(head_dim)", "init.logits_too_large"),
        )  # fmt: skip
    logits = (trace.logits if trace is not None else new.logits(ids)).double()
    ctx.within(
        float(logits.std(-1).median()),
        (2 * NAT) ** 0.5,
        "logits spread too far at initialisation (standard deviation over the vocabulary)",
        hint=Hint(
            "the head or the embedding it is tied to starts too large, or the norm before it is missing",
            "init.logits_too_large",
        ),
    )


@register_check(
    "init.seeded",
    holds="same seed, same weights; other seed, other weights; layers differ",
    needs=("rebuild",),
    requires=(),
    profile="default",
)
def check_seeded(subject: Specimen, ctx: Context) -> None:
    """Three builds: twice under one seed, once under another; constants (zeros, ones, decay tables) are exempt.

    A seed that the builder's own code sets, not the model's, is left out. Two blocks with equal random matrices are one
    block copied, or a generator that is seeded again for each.
    """
    first, again, other = (newly_built(subject, ctx, offset) for offset in (0, 0, 1))
    weights, repeated, others = (dict(named_tensors(part.module)) for part in (first, again, other))
    for name, tensor in weights.items():
        twin = repeated.get(name)
        if twin is None or twin.shape != tensor.shape:
            ctx.fail(f"building twice under one seed gives another set of weights: {name}", where=name)
        elif not same_bits(tensor, twin):
            ctx.fail(
                "building twice under the same seed gives different weights",
                where=name,
                hint=Hint(
                    "it is drawn from another generator than torch's (numpy, random, a generator of its own), from "
                    "memory that torch.empty() left uninitialised, or in the order of a set",
                    "init.not_seeded",
                ),
            )
    for name, parameter in first.module.named_parameters():
        if looks_random(first.module, name, parameter) and same_bits(parameter, others.get(name)):
            ctx.fail(
                "another seed gives the same random weights",
                where=name,
                hint=Hint(
                    "the builder or a layer calls torch.manual_seed() or brings its own seeded generator: runs that "
                    "are to be independent start equal",
                    "init.not_seeded",
                ),
            )
    check_blocks_differ(ctx, first, others)


def check_stream(ctx: Context, trace: traces.Stream) -> None:
    """Hidden states by block: finite, neither faint nor grown more than linearly with depth."""
    sizes = [float(state.double().square().mean().sqrt()) for state in trace.states]
    ctx.note("hidden-state RMS at initialisation: " + " ".join(f"{size:.3g}" for size in sizes))
    base = max(sizes[0], UNIT)
    factors = sorted(after / max(before, 1e-30) for before, after in pairwise(sizes))
    added = sorted(after - before for before, after in pairwise(sizes))
    alone = len(added) > 1 and factors[-2] < EVEN and added[-2] < ASIDE * added[-1]
    hint = ONE_BLOCK if alone else EVERY_BLOCK
    for index, (name, size) in enumerate(zip(trace.names, sizes, strict=True)):
        if not size >= FAINT:
            ctx.fail(
                f"hidden states have RMS {size:.3g} at initialisation: beside a norm's epsilon they are nothing",
                where=name,
                measured=size,
                allowed=FAINT,
                hint=Hint(
                    "weights of zeros where no residual goes around them, or a scale applied twice",
                    "init.residual_scaling",
                ),
            )
        if index:
            ctx.within(
                size, base * (1 + 2 * index),
                "hidden states grow faster than linearly over depth at initialisation",
                where=f"{name}, RMS {size:.3g}", hint=hint,
            )  # fmt: skip


def check_blocks_differ(ctx: Context, first: Specimen, others: dict[str, Tensor]) -> None:
    """No two blocks hold the same random matrix under the same name, nor in any other place of the same shape."""
    found = structure.blocks(first.module)
    if found is None:
        return
    prefix, blocks = found
    seen: dict[Any, tuple[str, Tensor]] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            full = f"{prefix}.{index}.{name}"
            if parameter.dim() < 2 or constant(parameter) or same_bits(parameter, others.get(full, parameter)):
                continue
            if parameter.dim() > 2 and len(parameter) > 1 and bool((parameter[1:] == parameter[:1]).all()):
                ctx.fail(
                    f"{len(parameter)} matrices of one parameter start as the same random matrix",
                    where=full,
                    hint=Hint(
                        "experts or heads that are drawn once and repeated: they get the same gradient and stay the "
                        "same; draw each by itself",
                        "init.shared_layers",
                    ),
                )
            key = (tuple(parameter.shape), float(parameter.detach().flatten()[0]), float(parameter.detach().sum()))
            place, earlier = seen.setdefault(key, (full, parameter))
            if earlier is not parameter and same_bits(earlier, parameter):
                ctx.fail(
                    "two layers start with the same random matrix",
                    where=f"{place} and {full}",
                    hint=Hint(_why_alike(block), "init.shared_layers"),
                )


def _why_alike(block: nn.Module) -> str:
    from torch import nn

    if isinstance(block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        kind = type(block).__name__.removesuffix("Layer")
        return (
            f"nn.{kind} copies one layer with copy.deepcopy(), its random weights included, so that all layers start "
            "as one: draw them anew after building it (for p in model.parameters(): if p.dim() > 1: "
            "nn.init.xavier_uniform_(p)), as nn.Transformer does"
        )
    return (
        "a block copied with copy.deepcopy(), or a generator seeded again for each layer: the layers start as one "
        "and differ only by what depth makes of their gradients; draw each layer's weights by itself"
    )


# -- building ------------------------------------------------------------------------------------------------------


def newly_built(subject: Specimen, ctx: Context, offset: int = 0) -> Specimen:
    """A new build, under the run's seed (or one further); not applicable where the builder loads a checkpoint."""
    import torch

    loads: list[int] = []
    original = torch.nn.Module.load_state_dict

    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loads.append(1)
        return original(self, *args, **kwargs)

    torch.nn.Module.load_state_dict = watched  # type: ignore[method-assign]
    try:
        with builders_seed_left_out() as places:
            new = subject.fresh(subject.seed + offset)
    finally:
        torch.nn.Module.load_state_dict = original  # type: ignore[method-assign]
    if loads or getattr(new.module, "name_or_path", None):
        ctx.not_applicable("the builder loads trained weights; nothing is left of an initialisation")
    for place in places:
        ctx.note(
            f"the builder sets the seed itself ({place}): left out here, where weights of several seeds are wanted"
        )
    return new


# -- measuring -----------------------------------------------------------------------------------------------------


def loss_hint(logits: Tensor, ids: Tensor) -> str:
    """Which of the usual reasons it is: the input's own token, or all logits."""
    own = float((logits.gather(-1, ids[..., None])[..., 0] - logits.mean(-1)).mean())
    spread = float(logits.std())
    if own > 3 * spread:
        return Hint(
            f"the logit of the token just read is {own:.3g} above the mean: the head is tied to an embedding whose "
            "entries start too large for its width; draw them with a standard deviation of about 1/width**0.5 or 0.02",
            "init.logits_too_large",
        )
    return Hint(
        f"logits start with a standard deviation of {spread:.3g}: the head (or the embedding it is tied to) is drawn "
        "too large, or its input is not normed; a standard deviation of 0.02 is usual",
        "init.logits_too_large",
    )


def content_spread(found: traces.Scores) -> float:
    """Standard deviation of the scores between sequences at the same place: position biases drop out."""
    import torch

    seen = found.visible.expand_as(found.values).all(dim=0)
    values = found.values.double()
    # what is common to all keys of a row does not change a softmax
    counted = torch.where(seen, values, torch.zeros_like(values))
    centred = values - counted.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
    spread = torch.where(seen, centred, torch.zeros_like(centred)).std(dim=0)
    full = spread[seen & (seen.sum(-1, keepdim=True) >= 8)]
    return float(full.square().mean().sqrt()) if full.numel() else math.nan


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def same_bits(left: Tensor, right: Tensor | None) -> bool:
    """Equal shape and values; NaN equals NaN."""
    import torch

    if right is None or left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = left.detach(), right.detach()
    if torch.equal(left, right):
        return True
    return left.is_floating_point() and bool(torch.isclose(left, right, rtol=0, atol=0, equal_nan=True).all())


def constant(tensor: Tensor) -> bool:
    flat = tensor.detach().flatten()
    return flat.numel() == 0 or bool((flat == flat[0]).all())


def looks_random(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """A trainable weight of a projection or table whose entries are nearly all different."""
    from torch import nn

    if not parameter.requires_grad or parameter.dim() < 2 or constant(parameter):
        return False
    owner = module.get_submodule(name.rpartition(".")[0])
    if type(owner) not in (nn.Linear, nn.Embedding) and type(owner).__name__ != "Conv1D":
        return False
    return parameter.detach().unique().numel() > parameter.numel() // 2
