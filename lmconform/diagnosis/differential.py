"""diagnose: results in, ranked causes out, each with evidence, place, confirmation and remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmconform.diagnosis.catalogue import CauseEntry, catalogue
from lmconform.diagnosis.probes import probe
from lmconform.diagnosis.ranking import Evidence, explained, rank
from lmconform.results import Cause, Result

if TYPE_CHECKING:
    from lmconform.runner import Runner

LEAST = 0.02  # a cause less likely than this is not worth a reader's time


def diagnose(results: Sequence[Result], runner: Runner | None = None, *, spec: str = "", most: int = 5) -> list[Cause]:
    """The likeliest causes of the red results, worst first; empty where nothing is red.

    With a runner, probes run on its subject: they tell similar causes apart and name the place.
    """
    evidence = examine(results, runner)
    if not evidence.red:
        return []
    ranked = rank(catalogue().values(), evidence, most)
    kept = [(entry, score) for entry, score in ranked if score >= LEAST] or ranked[:1]
    spec = (runner.subject.spec or runner.subject.name) if runner is not None else spec
    return [_cause(entry, score, evidence, spec) for entry, score in kept]


def examine(results: Sequence[Result], runner: Runner | None = None) -> Evidence:
    """All that is known: the verdicts, and what the probes find that the red ones call for."""
    evidence = Evidence.of(results)
    if evidence.red and runner is not None:
        evidence.findings = probe(runner, evidence.red)
    return evidence


def _cause(entry: CauseEntry, score: float, evidence: Evidence, spec: str) -> Cause:
    checks = sorted(explained(entry, evidence), key=lambda check: -(evidence.red[check].margin or 0.0))
    places = [finding.where for finding in evidence.findings if finding.cause == entry.id and finding.where]
    return Cause(
        id=entry.id,
        score=round(score, 3),
        summary=entry.summary,
        evidence=[
            {"check": check, "measured": evidence.red[check].measured, "allowed": evidence.red[check].allowed}
            for check in checks
        ],
        where="; ".join(dict.fromkeys(places)),
        confirm=entry.confirm.replace("{spec}", spec),
        mend=entry.mend,
    )
