"""The reference's parts put into a copy of the subject, where both have the same weights: settings, then modules.

What makes the logits agree names the place; its name says what kind of part it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.measuring import traces

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

Error = Callable[["Specimen"], float]  # how far a specimen's logits are from the reference's

KINDS = (  # what a module or a setting of that name decides; the first that matches
    (re.compile(r"(^|[._])(rot(ary)?|rope|inv_freq|theta|alibi|slopes?)([._]|$)", re.IGNORECASE), "position.rates"),
    (re.compile(r"(^|[._])(ln_?\w*|\w*norm\w*|\w*eps(ilon)?)$", re.IGNORECASE), "norm.epsilon"),
    (re.compile(r"(^|[._])(act\w*|gelu\w*|silu)$", re.IGNORECASE), "activation.differs"),
)  # fmt: skip
ALIKE = {"position.rates": ("position.base_kept",)}  # two encodings at once are one at other rates
EXCLUDED = {  # where the cause is cured: what changes scores too, and never by one factor
    "attention.unscaled": ("position.layout", "position.rates", "position.base_kept"),
}
SCALES = re.compile(r"scal|norm_factor|factor", re.IGNORECASE)
MOST = 48  # kinds of module that are tried


def settings(ours: Specimen, theirs: Specimen, error: Error, bound: float) -> Finding | None:
    """Numbers that modules of one name hold in both, and that differ: set to the reference's one name at a time."""
    given = dict(theirs.module.named_modules())
    differing: dict[str, list[tuple[str, float, float]]] = {}
    for name, part in ours.module.named_modules():
        for key, value in vars(part).items():
            other = vars(given[name]).get(key) if name in given else None
            if isinstance(value, float) and isinstance(other, float) and value != other:
                differing.setdefault(key, []).append((name, value, other))
    for key, places in differing.items():
        copied = ours.copy()
        for name, _, other in places:
            setattr(copied.module.get_submodule(name), key, other)
        if (after := error(copied)) <= bound:
            name, value, other = places[0]
            full = f"{name}.{key}".lstrip(".")
            cause = _kind(full)
            if not cause and SCALES.search(key):
                cause = "attention.unscaled" if re.search(r"att", name, re.IGNORECASE) else "scale.hidden"
            where = f"{full} is {value:.4g} and the reference's {other:.4g}: with that the logits agree to {after:.2g}"
            return Finding(cause or "config.unread", Verdict.cured, where)
    return None


def modules(ours: Specimen, theirs: Specimen, error: Error, bound: float) -> Finding | None:
    """The reference's modules of one name, in all layers at once, in the place of the subject's: the smallest first."""
    given = dict(theirs.module.named_modules())
    groups: dict[str, list[str]] = {}
    for name, _ in ours.module.named_modules():
        if name and name in given:
            groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    inner = sorted(groups.values(), key=lambda names: sum(1 for _ in given[names[0]].modules()))
    for names in inner[:MOST]:
        if not (cause := _kind(names[0])):
            continue
        copied = ours.copy()
        for name in names:
            holder, _, leaf = name.rpartition(".")
            part = copy.deepcopy(given[name]).to(copied.device).to(copied.dtype)
            setattr(copied.module.get_submodule(holder), leaf, part)
        if (after := error(copied)) <= bound:
            where = f"with the reference's {names[0]} in its place the logits agree to {after:.2g}"
            return Finding(cause, Verdict.cured, where)
    return None


def scores(ours: Specimen, theirs: Specimen, ids: Tensor, error: Error, bound: float) -> Finding | None:
    """Attention scores in the first block where they differ: by a factor, or by something that no token decides.

    A factor is undone, and the logits compared; `error` must run the subject on tokens of the shape of `ids`.
    """
    mine = traces.attention_scores(ours, ids.to(ours.device))
    right = traces.attention_scores(theirs, ids.to(theirs.device))
    for left, other in zip(mine, right):
        if left.values.shape != other.values.shape:
            return None
        factor = _multiple(left, other)
        if factor == 1.0:
            continue
        where = f"attention scores of block {left.block}"
        if factor is not None:
            told = f"{where} are {factor:.4g} times the reference's"
            if not (after := _without_factors(ours, right, ids, error)) <= bound:
                return Finding("attention.unscaled", Verdict.seen, told)
            undone = f"{told}; with the factor taken out in every block that has one the logits agree to {after:.2g}"
            return Finding("attention.unscaled", Verdict.cured, undone)
        given, expected = _both_centred(left, other)
        apart = given - expected
        if float((apart - apart[:1]).abs().max()) <= 1e-3 * float(apart.abs().max()):
            told = f"{where}: what differs depends on the places of query and key and not on the text"
            return Finding("position.rates", Verdict.seen, told)
        return None
    return None


def _without_factors(ours: Specimen, right: list[traces.Scores], ids: Tensor, error: Error) -> float:
    """The error once scores that are a multiple of the reference's are divided by it, in each block as it comes."""
    calls = iter(right)

    def undone(mine: traces.Scores) -> Tensor | None:
        other = next(calls, None)
        if other is None or other.values.shape != mine.values.shape:
            return None
        factor = _multiple(mine, other)
        if factor in (None, 0.0, 1.0):
            return None
        return mine.values.where(~_compared(mine, other).to(mine.values.device), mine.values / factor)

    with traces.scores_seen(ours, ids, undone):
        return error(ours)


def _multiple(left: traces.Scores, other: traces.Scores) -> float | None:
    """What the reference's scores are multiplied by: 1 where the two agree, None where it is no one number."""
    given, expected = _both_centred(left, other)
    size = float(expected.abs().max())
    if float((given - expected).abs().max()) <= 1e-4 * size:
        return 1.0
    factor = float((given * expected).sum() / expected.square().sum())
    return factor if float((given - factor * expected).abs().max()) <= 1e-3 * size else None


def _compared(left: traces.Scores, other: traces.Scores) -> Tensor:
    """Which scores are compared, [batch, heads, query, key]: where both may look, sinks that are alike left out."""
    seen = (left.visible & other.visible.to(left.visible.device)).expand_as(left.values).cpu().clone()
    sinks = slice(left.values.shape[-2], None)
    if left.values[..., sinks].cpu().equal(other.values[..., sinks].cpu()):
        seen[..., sinks] = False
    return seen


def _both_centred(left: traces.Scores, other: traces.Scores) -> tuple[Tensor, Tensor]:
    seen = _compared(left, other)
    return _centred(left.values.cpu(), seen), _centred(other.values.cpu(), seen)


def _centred(values: Tensor, seen: Tensor) -> Tensor:
    """Without what is common to all keys of a query, which a softmax does not see; 0 where a query may not look."""
    kept = values.double().where(seen, values.new_zeros(()).double())
    return (kept - kept.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)) * seen


def _kind(name: str) -> str:
    return next((cause for pattern, cause in KINDS if pattern.search(name)), "")
