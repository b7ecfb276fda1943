"""parity: the model computes what its reference computes, with weights that came from there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lmconform import charts, tolerance
from lmconform.checks import parity_readings as readings
from lmconform.checks.scale import SOFTMAX_TIME, entropy_of
from lmconform.context import Hint, Unavailable
from lmconform.measuring import traces
from lmconform.measuring.pairing import pair_parameters, unclaimed
from lmconform.registry import register_check
from lmconform.specimen import random_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

COMPARING = ("contract.shape", "contract.finite", "contract.repeatable")
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
    requires=COMPARING,
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
        "the first position differs already, where attention sees one token: look at the embedding, the position of "
        "the first token, norms (eps), the activation, and untransferred weights; parity.hidden names the layer, "
        "parity.transfer the weight",
        "weights.not_loaded",
        "weights.sliced_wrong",
        "norm.epsilon",
        "activation.differs",
        "position.offset",
        "scale.hidden",
    )


@register_check(
    "parity.hidden",
    holds="hidden states equal the reference's at every layer; the first module that differs is named",
    needs=("ref",),
    requires=COMPARING,
)
def check_hidden(subject: Specimen, ctx: Context) -> None:
    """The residual stream before the first block, after each, and the logits, in this order.

    At the first block that differs, outputs of its modules are looked up among the outputs of the reference's block.
    """
    ours, theirs = both(subject)
    columns = columns_of(ctx, ours, theirs)
    ids = shared_ids(ctx, ours, theirs, 2, 32)
    mine, expected = _streams(ctx, ours, theirs, ids)
    count = min(len(mine.states), len(expected.states))
    if mine.names[-1].startswith("hidden_states") != expected.names[-1].startswith("hidden_states"):
        count -= 1  # one was read at the blocks, the other as forward() gives it: the last is after the norm there
    noises = [max(pair) for pair in zip(_stream_noise(ours, ids, mine), _stream_noise(theirs, ids, expected))]
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
                or _first_module(ours, theirs, ids, mine.names[index], expected.names[index], slack)
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
    """What makes the logits equal: rotary positions applied twice, scales of its own, a fused projection's order."""
    bound = tolerance.allowed(max(ours.noise, theirs.noise), expected.to(mine.dtype))
    columns = mine.shape[-1]
    copied = ours.copy()

    def differs() -> float:
        return float((answer(copied, ids, columns).double() - expected.cpu().double()).abs().max())

    return (
        readings.turned_twice(theirs, mine.cpu(), ids, columns, bound)
        or readings.own_scale(copied, theirs, differs, bound)
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


def _streams(ctx: Context, ours: Specimen, theirs: Specimen, ids: Tensor) -> tuple[traces.Stream, traces.Stream]:
    mine, expected = traces.stream(ours, ids), traces.stream(theirs, ids.to(theirs.device))
    for what, trace in (("subject", mine), ("reference", expected)):
        if trace is None:
            raise Unavailable(f"no repeated blocks were found in the {what}, and its forward() gives no hidden states")
    assert mine is not None
    assert expected is not None
    if len(mine.states) != len(expected.states):
        ctx.fail(
            f"the model has {len(mine.states) - 1} blocks, the reference {len(expected.states) - 1}",
            where=f"{mine.names[-1]} (reference: {expected.names[-1]})",
            hint=Hint("the config was not carried over, or a block was left out or added", "weights.not_loaded"),
        )
    if mine.states[0].shape[-1] != expected.states[0].shape[-1]:
        ctx.fail(
            f"hidden states are {mine.states[0].shape[-1]} wide, the reference's {expected.states[0].shape[-1]}",
            where=mine.names[0],
            hint="the config was not carried over",
        )
    return mine, expected


def _stream_noise(specimen: Specimen, ids: Tensor, base: traces.Stream) -> list[float]:
    """Per state, what rounding does to it: the distance to the float64 copy, else to weights moved by one unit."""
    other = other_rounding(specimen)
    moved = traces.stream(other, ids.to(specimen.device))
    assert moved is not None
    return [tolerance.typical(a.double() - b.double()) for a, b in zip(base.states, moved.states)]


def other_rounding(specimen: Specimen) -> Specimen:
    """The same model under other rounding: its float64 copy, else a copy with weights moved by one unit."""
    import torch

    twin = specimen.twin()
    if twin is not None:
        return twin
    copied = specimen.copy()
    size = max(tolerance.epsilon(specimen.dtype), tolerance.TWIN_PERTURBATION)
    with torch.no_grad():
        for parameter in copied.module.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + size)
    return copied


def _first_module(ours: Specimen, theirs: Specimen, ids: Tensor, block: str, other: str, slack: float) -> str:
    """Which module inside the block first gives something that is found nowhere in the reference's block.

    What the reference never computes by itself, one head's share of the output, is no fault: a module is cleared where
    one behind it, which depends on it, agrees again.
    """
    mine = [call for call in traces.calls(ours, ids) if call.name.startswith(block + ".")]
    given = [call for call in traces.calls(theirs, ids.to(theirs.device)) if call.name.startswith(other + ".")]
    known = [call.output for call in given] + [call.input for call in given if call.input is not None]

    def found(value: Tensor | None) -> bool | None:
        return None if value is None else any(_holds(whole, value, slack) for whole in known)

    agrees = [found(call.output) for call in mine]
    pool = [value.cpu().double().flatten(2) for value in known if value.dim() >= 3 and value.shape[:2] == ids.shape]
    reordered = ""
    for place, call in enumerate(mine):
        if agrees[place]:
            continue
        behind = {later.name for later, same in zip(mine[place + 1 :], agrees[place + 1 :]) if same}
        if behind and _moved_by(ours, ids, call.name, behind, mine):
            continue
        if _reordered(pool, call.output, slack):
            reordered = call.name
            continue
        if call.input is not None and found(call.input) is False:
            if call.input.dim() == 3 and any(_holds(v[:, :1], call.input[:, :1], slack) for v in known if v.dim() == 3):
                return Hint(
                    f"what goes into {call.name} is found nowhere in {other}, except at position 0, where attention "
                    "sees one token; every module before it agrees: look at the attention scores (position encoding, "
                    "its share of each head, scale) and the mask",
                    "position.layout",
                    "position.rates",
                    "position.base_kept",
                    "attention.unscaled",
                    "mask.window",
                )
            if reordered:
                return Hint(
                    f"what goes into {call.name} is found nowhere in {other}, and {reordered} before it gives the "
                    "channels of the reference in another order: heads, or q, k and v, are laid out otherwise than the "
                    "code behind it reads them (parity.transfer says which); or that code differs",
                    "weights.sliced_wrong",
                    "attention.heads_scrambled",
                    "position.layout",
                    "attention.kv_groups",
                )
            return Hint(
                f"what goes into {call.name} is found nowhere in {other}, and every module before it agrees: look at "
                "the code between the last module that agrees and this one (activation, attention scores, mask, "
                "positions)",
                "activation.differs",
                "position.layout",
                "attention.kv_groups",
                "attention.heads_scrambled",
                "attention.unscaled",
            )
        matrices = [n for n, p in ours.module.get_submodule(call.name).named_parameters() if p.dim() > 1]
        lost = set(unclaimed(ours.module, pair_parameters(ours.module, theirs.module)))
        there = not any(f"{call.name}.{matrix}" in lost for matrix in matrices)
        weights = ("weights.sliced_wrong", "weights.not_loaded") if there else ("weights.not_loaded",)
        return Hint(
            f"{call.name} takes an input that the reference has too and gives an output that is found nowhere in "
            f"{other}: its weights or its settings (eps, bias, activation)",
            *(weights if matrices else ("norm.epsilon", "weights.not_loaded")),
        )
    return ""


def _moved_by(ours: Specimen, ids: Tensor, name: str, behind: set[str], before: list[traces.Call]) -> bool:
    """Whether any of the modules `behind` gives something else once the output of module `name` is changed."""
    import torch

    def change(module: object, args: object, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(first, torch.Tensor):
            return output
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
        moved = first + 0.1 * first.abs().max() * noise
        return type(output)((moved, *output[1:])) if isinstance(output, tuple | list) else moved

    with traces.hooked(ours.module.get_submodule(name).register_forward_hook(change)):
        after = {call.name: call.output for call in traces.calls(ours, ids)}
    return any(call.name in behind and not torch.equal(call.output, after[call.name]) for call in before)


def _holds(whole: Tensor, value: Tensor, slack: float) -> bool:
    """Whether `value` is `whole`, or a slice of its last axis (a fused projection), up to reshaping."""
    import torch

    whole, value = whole.cpu().double(), value.cpu().double()
    bound = slack * float(value.abs().max())
    if whole.numel() == value.numel():
        return bool(torch.isclose(whole.flatten(), value.flatten(), rtol=0, atol=bound).all())
    if whole.shape[:-1] != value.shape[:-1] or whole.shape[-1] < value.shape[-1]:
        return False
    width = value.shape[-1]
    return any(
        bool(((whole[..., start : start + width] - value).abs() <= bound).all())
        for start in range(0, whole.shape[-1] - width + 1, width)
    )


def _reordered(pool: list[Tensor], value: Tensor, slack: float) -> bool:
    """Whether every channel of `value` [batch, time, ...] is one in the pool: fused, split or permuted projections."""
    import torch

    if not pool or value.dim() < 3 or value.shape[:2] != pool[0].shape[:2]:
        return False
    channels = value.cpu().double().flatten(2).flatten(0, 1).T  # [channel, batch * time]
    bound = slack * float(value.abs().max())
    left = torch.ones(len(channels), dtype=torch.bool)
    for whole in pool:
        apart = torch.cdist(channels[left], whole.flatten(0, 1).T.contiguous(), p=float("inf"))
        left[left.clone()] = apart.amin(-1) > bound
        if not bool(left.any()):
            return True
    return False


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
    mine, expected = _streams(ctx, ours, theirs, ids)
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
            hint=_sized(ours, theirs, ids, *states[index], *states[-1]) if measured > math.log(BAND) else "",
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
    ours: Specimen, theirs: Specimen, ids: Tensor, state: Tensor, other: Tensor, logits: Tensor, expected: Tensor
) -> Hint:
    """Whether another size is the fault, a multiple of what the reference has, or follows from another fault."""
    left, right = state.cpu().double(), other.cpu().double()
    factor = float((left * right).sum() / right.square().sum().clamp(min=1e-300))
    if float((left - factor * right).abs().max()) <= 0.05 * abs(factor) * float(right.abs().max()):
        return Hint(
            f"it is {factor:.4g} times the reference's in every place: a scale factor is missing or applied twice "
            "(embedding times sqrt(width), residual scaling, soft cap); mend that, do not rescale the hidden states",
            "scale.hidden",
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
