"""Active probes: run when several causes explain the results, to tell them apart and to name the place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lmconform.diagnosis.probes import decoding, leak, neighbours, padding
from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    from lmconform.diagnosis.ranking import Evidence
    from lmconform.runner import Runner
    from lmconform.specimen import Specimen

Finding = dict[str, tuple[float, str]]  # cause id: log-odds that the probe adds, and the place ("" where none)

PROBES: tuple[tuple[tuple[str, ...], Callable[[Specimen, int], Finding]], ...] = (
    (("causality.no_future_leak", "causality.train_mode", "causality.gradient"), leak.probe),
    (("batching.row_independence",), neighbours.probe),
    (("padding.left", "padding.right"), padding.probe),
    (("cache.decode", "cache.chunks"), decoding.probe),
)


def probe(runner: Runner, evidence: Evidence) -> dict[str, str]:
    """Run the probes that red checks call for; adds to `evidence.probed`, returns the place found for a cause."""
    places: dict[str, str] = {}
    for checks, run in PROBES:
        if not any(check in evidence.red for check in checks):
            continue
        try:
            found = runner.guarded(lambda run=run: run(runner.subject, runner.seed))  # type: ignore[misc]
        except Unavailable:
            continue
        for cause, (odds, place) in found.items():
            evidence.probed[cause] += odds
            if place:
                places.setdefault(cause, place)
    return places
