"""parity.transfer: each weight of the reference is in the model, and does there what it does in the reference."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.checks import parity_readings as readings
from lmconform.checks.parity import answer, both, columns_of, shared_ids
from lmconform.checks.parity_misplaced import misplacement
from lmconform.context import Hint
from lmconform.measuring import traces
from lmconform.measuring.pairing import Pair, crossed, pair_parameters, unclaimed
from lmconform.registry import register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

ALIKE = 0.25  # share of a weight's influence that may differ: another direction, not another rounding
SMALL = 1e-3  # share of a movement that a difference in front of it may have, to judge the movement all the same
PERTURBATION = 0.3  # of a weight's own RMS
UNTOLD = (  # the numbers are there and act in another way: what may be, where no remedy was found
    "attention.heads_scrambled", "weights.sliced_wrong", "position.offset", "position.layout", "attention.kv_groups",
    "weights.not_loaded",
)  # fmt: skip


@register_check(
    "parity.transfer",
    holds="each weight of the reference moves the logits of both models alike",
    needs=("ref",),
    requires=("contract.shape", "contract.finite"),
)
def check_transfer(subject: Specimen, ctx: Context) -> None:
    """Every weight of the reference is found in the subject by value, then perturbed in both at once.

    A weight that is found but is used the other way round (a transposed square matrix, columns sliced where rows were
    meant) moves the logits in another direction; one that is found nowhere was not transferred.
    """
    given, reference = both(subject)
    columns = columns_of(ctx, given, reference)
    ids = shared_ids(ctx, given, reference, 2, 12)
    ours, theirs = given.copy(), reference.copy()
    mine, expected = _states(ours, ids, columns), _states(theirs, ids, columns)
    if [state.shape for state in mine] != [state.shape for state in expected]:
        mine, expected = mine[-1:], expected[-1:]  # streams that cannot be compared: by the logits alone
    bounds = [
        tolerance.allowed(tolerance.typical(state - moved.double()), state.to(given.dtype))
        for state, moved in zip(expected, _states(tolerance.other_rounding(reference), ids, columns)[-len(expected) :])
    ]
    bounds[-1] = tolerance.allowed(max(given.noise, reference.noise), expected[-1].to(given.dtype))
    agree = bool(((mine[-1] - expected[-1]).abs() <= bounds[-1]).all())
    pairs = pair_parameters(ours.module, theirs.module)
    _check_found(ctx, ours, theirs, pairs, ids, columns, agree, bounds[-1])
    judged: list[tuple[float, Pair]] = []
    for pair in filter(lambda pair: pair.links, pairs):
        share = _unlike(ctx, ours, theirs, pair, ids, columns, mine, expected, bounds)
        if share is not None:
            judged.append((share, pair))
    if not judged:
        ctx.not_applicable("none of the reference's weights is found in the model and moves its logits")
    turned = [p for share, p in judged if share > ALIKE and _turned(ours, theirs, p)]
    wrong = [p for share, p in judged if share > ALIKE]

    def differs() -> float:
        return float((answer(ours, ids, columns).double() - expected[-1]).abs().max())

    misplaced = misplacement(ours.module, wrong, differs, bounds[-1])
    named = misplaced.pairs if misplaced else turned  # of all that act otherwise, what a remedy was found for
    near = _nearness(ours, theirs, ids, wrong)
    worst, pair = max(judged, key=lambda item: (item[1] in named, near.get(item[1].reference, -1), item[0]))
    if misplaced:
        hint: str = misplaced.hint
    else:
        hint = _remedy(ours, theirs, pairs, wrong, pair, ids, columns, expected[-1], bounds[-1]) if wrong else ""
        if isinstance(hint, Hint) and hint.suspects == UNTOLD and _agree_before_the_head(mine, expected, bounds):
            hint = Hint(
                "hidden states agree up to the last block: what comes after it acts in another way (a scale, a "
                "temperature or a soft cap of the logits, the final norm, a head that is not the embedding's)",
                "scale.logits",
                "weights.untied",
                "weights.sliced_wrong",
            )
    ctx.within(
        worst,
        ALIKE,
        f"{pair.reference} of the reference was found in {pair.places}, and acts in another direction there",
        where=misplaced.places if misplaced else pair.places,
        hint=hint,
    )


def _states(specimen: Specimen, ids: Tensor, columns: int) -> list[Tensor]:
    """The stream, where it can be had, then the logits; float64 on the CPU."""
    ids = ids.to(specimen.device)
    trace = traces.stream(specimen, ids)
    if trace is None:
        return [answer(specimen, ids, columns).double()]
    return [state.cpu().double() for state in (*trace.states, trace.logits[..., :columns])]


def _turned(ours: Specimen, theirs: Specimen, pair: Pair) -> bool:
    return any(crossed(link, ours.module, theirs.module, pair.reference) for link in pair.links)


def _nearness(ours: Specimen, theirs: Specimen, ids: Tensor, wrong: list[Pair]) -> dict[str, int]:
    """How near to the fault each weight that acts otherwise stands: 3 in the module that is at fault, 0 behind it.

    A module at fault makes another output of the same input (3); one that makes the same output of it stands in front
    of the fault (1), and one that is given another input behind it (0). 2 where the two cannot be compared.
    """
    if not wrong:
        return {}
    made, given = _first_calls(ours, ids), _first_calls(theirs, ids)

    def near(pair: Pair) -> int:
        name = pair.links[0].subject.rpartition(".")[0]
        mine, right = made.get(name), given.get(pair.reference.rpartition(".")[0])
        if mine is None or right is None:
            return 2
        if _same(mine.input, right.input) is False:
            return 0
        vector = theirs.module.get_parameter(pair.reference).dim() < 2
        if vector and any(ours.module.get_submodule(name).children()):
            return 1  # a sink or a gain beside projections: the output is theirs
        same = _same(mine.output, right.output)
        return 2 if same is None else 1 if same else 3

    return {pair.reference: near(pair) for pair in wrong}


def _first_calls(specimen: Specimen, ids: Tensor) -> dict[str, traces.Call]:
    found: dict[str, traces.Call] = {}
    for call in traces.calls(specimen, ids.to(specimen.device)):
        found.setdefault(call.name, call)
    return found


def _same(left: Tensor | None, right: Tensor | None) -> bool | None:
    """Whether two are equal up to rounding; None where they cannot be compared."""
    if left is None or right is None or left.shape != right.shape or not left.numel():
        return None
    one, other = left.cpu().double(), right.cpu().double()
    return float((one - other).abs().max()) <= SMALL * float(other.abs().max())


def _check_found(
    ctx: Context,
    ours: Specimen,
    theirs: Specimen,
    pairs: list[Pair],
    ids: Tensor,
    columns: int,
    agree: bool,
    bound: float,
) -> None:
    """Fail at the first weight that is not there, unless the logits agree: then it is stored in another form."""
    lost = [pair for pair in pairs if pair.found < 1.0 or not pair.equal]
    lost = _without_constants(ctx, ours, theirs, pairs, lost)
    lost = [pair for pair in lost if pair.options or _matters(ctx, theirs, pair, ids, columns, bound)]
    if not lost:
        return
    if agree and all(pair.options == [] or not pair.equal for pair in lost):
        telling = [pair for pair in lost if not _constant(theirs, pair)]
        if len(telling) == len(lost):
            ctx.note(f"{len(lost)} weights are kept in another form and were not compared: {lost[0].reference} is one")
            return
        lost = [pair for pair in lost if _constant(theirs, pair)]
    pair = lost[0]
    free = [name for name in unclaimed(ours.module, pairs) if _same_size(ours, theirs, name, pair.reference)]
    guess = f"; {free[0]} holds numbers from elsewhere and has its size" if free else ""
    if _constant(theirs, pair) and not pair.options:
        ctx.fail(
            f"{pair.reference} of the reference moves its logits and has no counterpart in the model",
            where=pair.reference,
            hint=Hint(
                "a bias or a norm that the model's code lacks: it is missed as soon as it is trained",
                "weights.not_loaded",
            ),
        )
    if pair.options and not pair.equal and pair.found == 1.0:
        ctx.fail(
            f"{pair.reference} of the reference is not what {pair.places} holds, where its matrix went",
            where=pair.places,
            hint=Hint(
                "the bias was not copied, or q, k and v were exchanged in one of matrix and bias",
                "weights.not_loaded",
                "weights.sliced_wrong",
            ),
        )
    share = f"{pair.found:.0%}" if pair.found else "none"
    ctx.fail(
        f"{pair.reference} of the reference was not transferred: {share} of its rows or columns are found in "
        f"the model{guess}" + (f"; nor were {len(lost) - 1} others" if len(lost) > 1 else ""),
        where=free[0] if free else pair.places if pair.options else pair.reference,
        hint=Hint(
            "a name that did not match and was skipped (strict=False), a slice with the wrong bounds or along "
            "the wrong "
            "axis, or a reshape where a transpose was meant",
            "weights.not_loaded",
            "weights.sliced_wrong",
        ),
    )


def _without_constants(
    ctx: Context, ours: Specimen, theirs: Specimen, pairs: list[Pair], lost: list[Pair]
) -> list[Pair]:
    """Matrices of one number, as a projection that starts at 0, have no rows to be found by: their shape must do."""
    places = {name: ours.module.get_parameter(name).detach() for name in unclaimed(ours.module, pairs)}
    rest = []
    for pair in lost:
        weight = theirs.module.get_parameter(pair.reference).detach()
        place = None
        if weight.dim() >= 2 and not pair.options and _constant(theirs, pair):
            place = next(
                (
                    name
                    for name, own in places.items()
                    if own.shape in (weight.shape, weight.shape[::-1])
                    and bool((own == weight.flatten()[0].to(own)).all())
                ),
                None,
            )
        if place is None:
            rest.append(pair)
        else:
            del places[place]
            ctx.note(f"{pair.reference} is one number throughout and was not told from {place}")
    return rest


def _constant(theirs: Specimen, pair: Pair) -> bool:
    weight = theirs.module.get_parameter(pair.reference)
    return bool((weight == weight.flatten()[0]).all())


def _same_size(ours: Specimen, theirs: Specimen, name: str, reference: str) -> bool:
    return sorted(ours.module.get_parameter(name).shape) == sorted(theirs.module.get_parameter(reference).shape)


def _noise_like(ctx: Context, weight: Tensor, salt: int) -> Tensor:
    import torch

    size = float(weight.detach().double().square().mean().sqrt())
    noise = torch.randn(weight.shape, generator=ctx.generator(salt)).to(weight)
    return noise * PERTURBATION * (size if size > 0 else 0.1)


def _matters(ctx: Context, theirs: Specimen, pair: Pair, ids: Tensor, columns: int, bound: float) -> bool:
    """Whether the reference's logits move with that weight: a key bias moves none."""
    import torch

    weight = theirs.module.get_parameter(pair.reference)
    before = answer(theirs, ids, columns)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(_noise_like(ctx, weight, 1))
        moved = answer(theirs, ids, columns)
        weight.copy_(kept)
    return float((moved - before).abs().max()) > bound


def _unlike(
    ctx: Context,
    ours: Specimen,
    theirs: Specimen,
    pair: Pair,
    ids: Tensor,
    columns: int,
    mine: list[Tensor],
    expected: list[Tensor],
    bounds: list[float],
) -> float | None:
    """How far the two movements differ, as a share of the larger, at the first state that the weight moves.

    There, because further on every difference between the models mixes in. None where the weight moves nothing, or
    where what enters its block differs already, so that it cannot be judged.
    """
    import torch

    weight = theirs.module.get_parameter(pair.reference)
    noise = _noise_like(ctx, weight, 2)
    kept = weight.detach().clone()
    last = len(expected)
    with torch.no_grad():
        weight.add_(noise)
        theirs_moved = [a - b for a, b in zip(_states(theirs, ids, columns)[-last:], expected)]
        weight.copy_(kept)
        if float(theirs_moved[-1].abs().max()) <= bounds[-1] / ALIKE:
            return None
        first = next(
            (i for i, moved in enumerate(theirs_moved) if float(moved.abs().max()) > bounds[i] / ALIKE), last - 1
        )
        slack = max(bounds[first - 1], SMALL * float(theirs_moved[first].abs().max()))  # tables made in float32 differ
        if first > 0 and bool(((mine[first - 1] - expected[first - 1]).abs() > slack).any()):
            return None
        shares = []
        for links in pair.options:
            places = {link.subject: ours.module.get_parameter(link.subject) for link in links}
            before = {name: place.detach().clone() for name, place in places.items()}
            for link in links:
                place = places[link.subject]
                place.add_(link.carry(noise.to(place), place))
            moved = _states(ours, ids, columns)[-last:][first] - mine[first]
            for name, place in places.items():
                place.copy_(before[name])
            size = max(float(moved.norm()), float(theirs_moved[first].norm()))
            shares.append(float((moved - theirs_moved[first]).norm()) / size)
            if shares[-1] <= ALIKE:
                break
    return min(shares)


def _remedy(
    ours: Specimen,
    theirs: Specimen,
    pairs: list[Pair],
    wrong: list[Pair],
    worst: Pair,
    ids: Tensor,
    columns: int,
    expected: Tensor,
    bound: float,
) -> str:
    """What mends it, tried out: weights of this name that are turned, in all layers, taken along the other axis."""
    import torch

    alike = [pair for pair in pairs if _pattern(pair.reference) == _pattern(worst.reference)]
    before = float((answer(ours, ids, columns).double() - expected).abs().max())
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        for pair in alike:
            weight = theirs.module.get_parameter(pair.reference)
            if weight.dim() != 2 or weight.shape[0] != weight.shape[1] or not _turned(ours, theirs, pair):
                continue
            for link in pair.links:
                place = ours.module.get_parameter(link.subject)
                kept.setdefault(link.subject, place.detach().clone())
                made = link.swapped().carry(weight.detach().to(place), place)
                place.copy_(torch.where(link.carry(torch.ones_like(weight).to(place), place) > 0, made, place))
        after = float((answer(ours, ids, columns).double() - expected).abs().max())
        for name, values in kept.items():
            ours.module.get_parameter(name).copy_(values)
    if kept and after < before / 4:
        verdict = (
            "equal the reference's" if after <= bound else f"come {before / after:.2g} times closer to the reference's"
        )
        whole = len(worst.links) == 1 and bool((worst.links[0].index >= 0).all())
        what = "transposed" if whole else f"cut along the other axis of {worst.reference} (rows for columns)"
        names = ", ".join(list(kept)[:4]) + (f" and {len(kept) - 4} more" if len(kept) > 4 else "")
        return Hint(f"tried out: with {names} {what}, the logits {verdict}", "weights.sliced_wrong")

    def differs() -> float:
        return float((answer(ours, ids, columns).double() - expected).abs().max())

    tried = readings.dealt(ours, theirs, ids, differs, bound) or readings.other_view(ours, worst, differs, bound)
    if tried is not None:
        return tried
    return Hint(
        f"the numbers are there, {len(wrong)} weights at this depth act in another way: q, k and v exchanged, heads in "
        "another order, slices along the wrong axis, rows read with an offset; or the code around them differs: "
        "parity.hidden names the module",
        *UNTOLD,
    )


def _agree_before_the_head(mine: list[Tensor], expected: list[Tensor], bounds: list[float]) -> bool:
    """Whether all states are the reference's, and the logits, which come last, are not."""
    off = [float((own - right).abs().max()) > bound for own, right, bound in zip(mine, expected, bounds)]
    return len(off) > 1 and off[-1] and not any(off[:-1])


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)
