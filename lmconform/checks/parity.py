"""parity: the model computes what its reference computes, with weights that came from there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lmconform import charts, tolerance
from lmconform.checks import parity_readings as readings
from lmconform.checks.scale import SOFTMAX_TIME, entropy_of
from lmconform.context import Hint, Unavailable
from lmconform.measuring import traces
from lmconform.measuring.first_difference import both_streams, first_module, stream_noise
from lmconform.measuring.pairing import pair_parameters
from lmconform.registry import COMPARES_LOGITS, register_check
from lmconform.specimen import random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

BAND = 1.1  # per-layer RMS may differ by this factor, either way


def both(subject: Specimen) -> tuple[Specimen, Specimen]:
    """Subject and reference with the weights they came with, in one dtype where that can be had."""
    import torch

    reference = subject.reference
    assert reference is not None
    if subject.dtype == torch.float64 and reference.dtype != torch.float64:
        twin = reference.twin()
        if twin is None:
            raise Unavailable("the reference does not run in float64")
        reference = twin
    return subject.as_loaded(), reference


def shared_ids(ctx: Context, ours: Specimen, theirs: Specimen, batch: int, time: int) -> Tensor:
    """Ordinary tokens that both vocabularies have, [batch, time]."""
    ordinary = [i for i in ours.ordinary_ids if i < theirs.vocab_size]
    time = theirs.longest(ours.longest(time))
    return random_ids(ordinary, batch, time, ctx.generator(batch, time)).to(ours.device)


def answer(specimen: Specimen, ids: Tensor, columns: int, **inputs: Any) -> Tensor:
    """Logits over the tokens that both have, on the CPU."""
    return specimen.logits(ids.to(specimen.device), **inputs)[..., :columns].cpu()


def columns_of(ctx: Context, ours: Specimen, theirs: Specimen) -> int:
    if ours.vocab_size != theirs.vocab_size:
        ctx.note(
            f"the vocabularies have {ours.vocab_size} and (the reference) {theirs.vocab_size} entries: "
            f"the first {min(ours.vocab_size, theirs.vocab_size)} are compared"
        )
    return min(ours.vocab_size, theirs.vocab_size)


@register_check(
    "parity.logits",
    holds="logits equal the reference's within the dtype's tolerance",
    needs=("ref",),
    requires=COMPARES_LOGITS,
    profile="smoke",
)
def check_logits(subject: Specimen, ctx: Context) -> None:
    """The same tokens into both, weights as they came; the bound is the noise of the noisier of the two."""
    ours, theirs = both(subject)
    columns = columns_of(ctx, ours, theirs)
    ids = shared_ids(ctx, ours, theirs, 3, 40)
    mine, expected = answer(ours, ids, columns), answer(theirs, ids, columns)
    bound = tolerance.allowed(max(ours.noise, theirs.noise), expected.to(mine.dtype))
    hint = Hint("")
    if not float((mine.double() - expected.double()).abs().max()) <= bound:
        hint = _reading(mine, expected, bound)
        if hint.suspects != ("scale.logits",):
            hint = _tried_out(ours, theirs, ids, mine, expected) or _added(ours, theirs, ids) or hint
        if hint.suspects[0] == "weights.not_loaded" and _all_found(ours, theirs):
            hint = Hint(hint, *hint.suspects[1:], "weights.not_loaded")
    ctx.equal(mine, expected, "logits differ from the reference's", allowed=bound, hint=hint)


def _reading(mine: Tensor, expected: Tensor, bound: float) -> Hint:
    """What the shape of the difference says, in a user's words."""
    mine, expected = mine.double(), expected.double()
    factor = float((mine * expected).sum() / expected.square().sum().clamp(min=1e-300))
    if (
        factor > 0
        and abs(factor - 1) > 0.01
        and float((mine - factor * expected).abs().max()) <= 4 * max(1.0, factor) * bound
    ):
        return Hint(
            f"the logits are {factor:.4g} times the reference's: a scale, temperature or soft cap before or "
            f"after the head",
            "scale.logits",
        )
    off = (mine - expected).abs().amax(-1).gt(bound).any(0)
    first = int(off.int().argmax()) if bool(off.any()) else 0
    sizes = (mine - expected).abs().amax((0, 2))
    if first > 0 and float(sizes.max()) > 30 * float(sizes[:first].max()):
        return Hint(
            f"positions 0 to {first - 1} agree, so embedding, norms and feed-forward do: look at what mixes positions "
            "(mask, position encoding, window, attention scale); parity.hidden names the layer",
            "position.layout",
            "position.rates",
            "attention.heads_scrambled",
            "attention.kv_groups",
            "attention.unscaled",
            "mask.missing",
        )
    return Hint(
        "the first position differs already, where attention sees one token, so that scores matter only beside a "
        "sink: look at the embedding, the position of the first token, norms (eps), values and the heads that they "
        "reach (key groups, head order), the output projection, the activation, and untransferred weights; "
        "parity.hidden names the layer, parity.transfer the weight",
        "weights.not_loaded",
        "weights.sliced_wrong",
        "norm.epsilon",
        "activation.differs",
        "position.offset",
        "scale.hidden",
        "attention.kv_groups",
        "attention.heads_scrambled",
    )


@register_check(
    "parity.hidden",
    holds="hidden states equal the reference's at every layer; the first module that differs is named",
    needs=("ref",),
    requires=COMPARES_LOGITS,
)
def check_hidden(subject: Specimen, ctx: Context) -> None:
    """The residual stream before the first block, after each, and the logits, in this order.

    At the first block that differs, outputs of its modules are looked up among the outputs of the reference's block.
    """
    ours, theirs = both(subject)
    columns = columns_of(ctx, ours, theirs)
    ids = shared_ids(ctx, ours, theirs, 2, 32)
    mine, expected = both_streams(ctx, ours, theirs, ids)
    count = min(len(mine.states), len(expected.states))
    if mine.names[-1].startswith("hidden_states") != expected.names[-1].startswith("hidden_states"):
        count -= 1  # one was read at the blocks, the other as forward() gives it: the last is after the norm there
    noises = [max(pair) for pair in zip(stream_noise(ours, ids, mine), stream_noise(theirs, ids, expected))]
    for index in range(count):
        place = f"{mine.names[index]} (reference: {expected.names[index]})"
        if index == 0:
            message = "hidden states differ from the reference's before the first block"
            hint: str = Hint(
                "embedding: its weights, its scale factor, its norm; the position table and where it is read "
                "(off by one, or counted from another start)",
                "scale.hidden",
                "weights.not_loaded",
                "position.offset",
                "position.base_kept",
            )
        else:
            message = f"hidden states first differ from the reference's after block {index - 1}, and not before it"
            hint = Hint(
                "inside this block: norms (eps), activation, attention scale, mask, position encoding, its weights",
                "weights.not_loaded",
                "norm.epsilon",
                "activation.differs",
            )
        bound = tolerance.allowed(noises[index], expected.states[index].to(mine.states[index].dtype))
        difference = float((mine.states[index].cpu().double() - expected.states[index].cpu().double()).abs().max())
        if not difference <= bound and index == 0:
            added = mine.states[0].cpu(), expected.states[0].cpu()
            hint = readings.added_by_position(ours, theirs, *added) or hint
        if not difference <= bound and index > 0:
            entering = (mine.states[index - 1].cpu().double() - expected.states[index - 1].cpu().double()).abs().max()
            slack = 8 * float(entering / expected.states[index - 1].abs().max()) + tolerance.FACTOR * tolerance.epsilon(
                mine.states[index].dtype
            )
            hint = (
                _tried_out(ours, theirs, ids, mine.logits[..., :columns], expected.logits[..., :columns])
                or first_module(ours, theirs, ids, mine.names[index], expected.names[index], slack)
                or hint
            )
        ctx.equal(
            mine.states[index].cpu(),
            expected.states[index].cpu(),
            message,
            where=place,
            allowed=bound,
            hint=hint,
            axes=("row", "position", "channel"),
        )
    left, right = mine.logits[..., :columns].cpu(), expected.logits[..., :columns].cpu()
    ctx.equal(
        left,
        right,
        "logits differ from the reference's, hidden states do not, up to the last block",
        allowed=tolerance.allowed(max(ours.noise, theirs.noise), right.to(left.dtype)),
        where="after the last block",
        hint=Hint(
            "the final norm, the head's weights or bias, a tie that was lost, or a scale or soft cap of the logits",
            "scale.logits",
            "weights.untied",
        ),
    )


def _tried_out(ours: Specimen, theirs: Specimen, ids: Tensor, mine: Tensor, expected: Tensor) -> Hint | None:
    """What makes the logits equal: rotary positions turned back, its own scales at 1, key groups, a fused order."""
    bound = tolerance.allowed(max(ours.noise, theirs.noise), expected.to(mine.dtype))
    columns = mine.shape[-1]
    copied = ours.copy()

    def differs() -> float:
        return float((answer(copied, ids, columns).double() - expected.cpu().double()).abs().max())

    return (
        readings.turned_twice(theirs, mine.cpu(), ids, columns, bound)
        or readings.own_scale(copied, theirs, differs, bound)
        or readings.dealt(copied, theirs, ids, differs, bound)
        or readings.fused_otherwise(copied, theirs, differs, bound)
    )


def _added(ours: Specimen, theirs: Specimen, ids: Tensor) -> Hint | None:
    """What differs before the first block, where it depends on the position alone."""
    mine, expected = traces.stream(ours, ids), traces.stream(theirs, ids.to(theirs.device))
    if mine is None or expected is None or mine.states[0].shape != expected.states[0].shape:
        return None
    left, right = mine.states[0].cpu(), expected.states[0].cpu()
    if float((left.double() - right.double()).abs().max()) <= readings.SAME * float(right.abs().max()):
        return None
    return readings.added_by_position(ours, theirs, left, right)


def _all_found(ours: Specimen, theirs: Specimen) -> bool:
    """Whether every weight of the reference stands in the model, in whatever place and layout."""
    return all(pair.found == 1.0 and pair.equal for pair in pair_parameters(ours.module, theirs.module))


@register_check(
    "parity.scale",
    holds="per-layer RMS ratio to the reference within the band",
    needs=("ref",),
    requires=("contract.shape", "contract.finite"),
    profile="smoke",
)
def check_scale(subject: Specimen, ctx: Context) -> None:
    """The median token's RMS after each block over the reference's, and the spread of the logits."""
    ours, theirs = both(subject)
    columns = columns_of(ctx, ours, theirs)
    ids = shared_ids(ctx, ours, theirs, 4, 32)
    mine, expected = both_streams(ctx, ours, theirs, ids)
    sizes = [(_rms(a), _rms(b)) for a, b in zip(mine.states, expected.states)]
    ratios = [own / max(other, 1e-300) for own, other in sizes]
    lines = {"the model": [own for own, _ in sizes], "the reference": [other for _, other in sizes]}
    ctx.record(charts.curves("Hidden-state RMS by layer", "blocks passed", "RMS", lines, log="y"))
    _record_entropies(ctx, ours, theirs)
    spread = float(
        mine.logits[..., :columns].double().std() / expected.logits[..., :columns].double().std().clamp(min=1e-300)
    )
    ctx.note("RMS over the reference's, by layer: " + " ".join(f"{r:.4g}" for r in ratios) + f"; logits: {spread:.4g}")
    places = [*mine.names, "logits"]
    for index, (ratio, place) in enumerate(zip([*ratios, spread], places)):
        before = ratios[index - 1] if index else 1.0
        measured = abs(math.log(ratio)) if ratio > 0 else math.inf
        states = [*zip(mine.states, expected.states), (mine.logits[..., :columns], expected.logits[..., :columns])]
        ctx.within(
            measured,
            math.log(BAND),
            f"{place} is {ratio:.4g} times the reference's in size (before it: {before:.4g} times)",
            where=place,
            hint=_sized(ours, theirs, ids, *states[index], *states[-1], place) if measured > math.log(BAND) else "",
        )


def _record_entropies(ctx: Context, ours: Specimen, theirs: Specimen) -> None:
    """Attention entropy by layer beside the reference's, where both have as many layers of it."""
    ids = shared_ids(ctx, ours, theirs, 4, SOFTMAX_TIME)
    lines = {
        name: [entropy_of(found) for found in traces.attention_scores(specimen, ids.to(specimen.device))]
        for name, specimen in (("the model", ours), ("the reference", theirs))
    }
    if len(lines["the model"]) == len(lines["the reference"]) > 0:
        ctx.record(charts.curves("Attention entropy by layer", "layer", "share of the largest", lines))


def _sized(
    ours: Specimen, theirs: Specimen, ids: Tensor, state: Tensor, other: Tensor, logits: Tensor, expected: Tensor,
    place: str,
) -> Hint:  # fmt: skip
    """Whether another size is the fault, a multiple of what the reference has, or follows from another fault."""
    left, right = state.cpu().double(), other.cpu().double()
    factor = float((left * right).sum() / right.square().sum().clamp(min=1e-300))
    if float((left - factor * right).abs().max()) <= 0.05 * abs(factor) * float(right.abs().max()):
        return Hint(
            f"it is {factor:.4g} times the reference's in every place: a scale factor is missing or applied twice "
            "(embedding times sqrt(width), residual scaling, soft cap); mend that, do not rescale the hidden states",
            "scale.logits" if place == "logits" else "scale.hidden",
        )
    found = _tried_out(ours, theirs, ids, logits, expected) or _added(ours, theirs, ids)
    if found is not None:
        return found
    return Hint(
        "the size is another because the values are, in no fixed ratio: parity.hidden names the first module, "
        "parity.transfer weights that are not in their place; mend that, do not rescale the hidden states",
        *(("weights.sliced_wrong",) if _all_found(ours, theirs) else ("weights.not_loaded", "weights.sliced_wrong")),
        "scale.hidden",
    )


def _rms(state: Tensor) -> float:
    return float(state.double().square().mean(-1).sqrt().flatten().median())
