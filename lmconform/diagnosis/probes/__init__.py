"""Active probes: run where several causes explain the results, to tell them apart and to name the place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lmconform.diagnosis.probes import (
    attending,
    backends,
    choosing,
    copying,
    dead,
    decoding,
    encoding,
    half_types,
    leak,
    losses,
    neighbours,
    padded_steps,
    padding,
    reference,
    untrained,
)
from lmconform.diagnosis.probes.finding import Finding, Verdict
from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    from collections.abc import Container

    from lmconform.runner import Runner
    from lmconform.specimen import Specimen

__all__ = ["Finding", "Verdict", "probe"]

LEAKS = ("causality.no_future_leak", "causality.train_mode", "causality.gradient")
MASKED = (
    *LEAKS, "causality.cached_chunk", "positions.reach", "cache.decode", "cache.chunks", "cache.decode_long",
    "generation.greedy", "generation.beams", "training.honest",
)  # fmt: skip
PROBES: tuple[tuple[tuple[str, ...], Callable[[Specimen, int], list[Finding]]], ...] = (
    (LEAKS, leak.probe),
    (MASKED, attending.probe),
    (("batching.row_independence",), neighbours.probe),
    (("padding.left", "padding.right"), padding.probe),
    (("cache.decode", "cache.chunks"), decoding.probe),
    (("padding.cached",), padded_steps.probe),
    (("generation.greedy",), choosing.probe),
    (("gradients.magnitude", "init.scale", "scale.residual"), dead.probe),
    (("persistence.copy",), copying.probe),
    (("positions.order_matters",), encoding.module),
    (("positions.shift",), encoding.shift),
    (("precision.bfloat16", "precision.float16"), half_types.probe),
    (("precision.backends",), backends.probe),
    (("loss.reference",), losses.probe),
    (("parity.logits", "parity.hidden", "parity.transfer", "parity.scale"), reference.probe),
    (("parity.gradients",), untrained.probe),
)


def probe(runner: Runner, red: Container[str]) -> list[Finding]:
    """What the probes find that these red checks call for. A probe that the subject refuses says nothing."""
    found: list[Finding] = []
    for checks, run in PROBES:
        if not any(check in red for check in checks):
            continue
        try:
            found += runner.guarded(lambda run=run: run(runner.subject, runner.seed))  # type: ignore[misc]
        except Unavailable:
            continue
    return found
