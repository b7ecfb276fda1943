"""Two attention implementations disagree: does one of them forget the factor 1 / sqrt(head_dim)?"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.measuring import traces
from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    from lmconform.specimen import Specimen

FACTOR = 0.02  # share by which a factor may be off


def probe(subject: Specimen, seed: int) -> list[Finding]:
    """The scores of each implementation, as the softmax gets them, in the first block where they differ."""
    change = getattr(subject.module, "set_attn_implementation", None)
    if not callable(change):
        raise Unavailable("no set_attn_implementation()")
    ids = subject.probe_ids(2, subject.longest(24))
    seen: dict[str, list[traces.Scores]] = {}
    logits: dict[str, Any] = {}
    for name in ("eager", "sdpa"):
        copied = subject.copy()
        with contextlib.suppress(ValueError, ImportError):
            copied.module.set_attn_implementation(name)  # type: ignore[operator]
            logits[name] = copied.logits(ids)
            seen[name] = traces.attention_scores(copied, ids)
    if len(seen) < 2 or len(seen["eager"]) != len(seen["sdpa"]):
        return []
    if float((logits["eager"] - logits["sdpa"]).abs().max()) <= tolerance.allowed(subject.noise, logits["eager"]):
        return []
    for left, right in zip(seen["eager"], seen["sdpa"]):
        if left.head_dim is None or left.values.shape != right.values.shape:
            return []
        both = (left.visible & right.visible).expand_as(left.values)
        given, other = left.values[both].double(), right.values[both].double()
        size = float(other.abs().max())
        if float((given - other).abs().max()) <= 1e-4 * size:
            continue
        factor = float((given * other).sum() / other.square().sum())
        if float((given - factor * other).abs().max()) > 1e-3 * abs(factor) * size:
            return [Finding("attention.unscaled", Verdict.against)]
        missing = left.head_dim**0.5
        for name, ratio in (("eager", factor), ("SDPA", 1 / factor)):
            if abs(ratio / missing - 1) <= FACTOR:
                where = f"{name} attention's scores of block {left.block} are sqrt({left.head_dim}) times the other's"
                return [Finding("attention.unscaled", Verdict.cured, where), Finding("mask.fast_path", Verdict.against)]
        where = f"eager attention's scores of block {left.block} are {factor:.4g} times SDPA's"
        return [Finding("attention.unscaled", Verdict.seen, where)]
    return [Finding("attention.unscaled", Verdict.against)]
