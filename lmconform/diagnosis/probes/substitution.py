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


def scores(ours: Specimen, theirs: Specimen, ids: Tensor) -> Finding | None:
    """Attention scores in the first block where they differ: by a factor, or by something that no token decides."""
    mine = traces.attention_scores(ours, ids.to(ours.device))
    right = traces.attention_scores(theirs, ids.to(theirs.device))
    for left, other in zip(mine, right):
        seen = (left.visible & other.visible.to(left.visible.device)).expand_as(left.values).cpu()
        if left.values.shape != other.values.shape:
            return None
        given, expected = _centred(left.values.cpu(), seen), _centred(other.values.cpu(), seen)
        size = float(expected.abs().max())
        apart = given - expected
        if float(apart.abs().max()) <= 1e-4 * size:
            continue
        where = f"attention scores of block {left.block}"
        factor = float((given * expected).sum() / expected.square().sum())
        if float((given - factor * expected).abs().max()) <= 1e-3 * size:
            told = f"{where} are {factor:.4g} times the reference's"
            return Finding("attention.unscaled", Verdict.seen, told)
        if float((apart - apart[:1]).abs().max()) <= 1e-3 * float(apart.abs().max()):
            told = f"{where}: what differs depends on the places of query and key and not on the text"
            return Finding("position.rates", Verdict.seen, told)
        return None
    return None


def _centred(values: Tensor, seen: Tensor) -> Tensor:
    """Without what is common to all keys of a query, which a softmax does not see; 0 where a query may not look."""
    kept = values.double().where(seen, values.new_zeros(()).double())
    return (kept - kept.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)) * seen


def _kind(name: str) -> str:
    return next((cause for pattern, cause in KINDS if pattern.search(name)), "")
