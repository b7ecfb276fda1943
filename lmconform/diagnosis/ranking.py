"""Differential diagnosis: how well each cause explains all results together.

A naive Bayes over verdicts: each cause predicts for each check how reliably it turns it red (causes.toml); red and
green results shift the odds against a background in which any check may be red. Verdicts of one family speak of much
the same thing, so a family's evidence counts as the square root of its size. On top, a check that measured more than
red or green (the shape of a leak, the step at which a cache errs) names suspects, and probes add or take away.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lmconform.diagnosis.catalogue import CauseEntry
from lmconform.results import Result, Status

RED = (Status.failed, Status.warned, Status.error)
GREEN = (Status.passed,)

RELIABILITY = {"always": 0.96, "often": 0.65, "sometimes": 0.25}
UNNAMED = 0.05  # a check the catalogue does not connect with the cause
SPARED = 0.015
BACKGROUND = 0.12  # that some other cause turns a given check red
SUSPECT = (2.6, 1.6, 1.0)  # log-odds of a check's first, second and further suspects
FURTHER = 0.35  # how much a second check's suspicion adds to a first one's
TEMPERATURE = 1.6  # of the softmax that turns log-odds into scores; fitted on the tuning half of the planted faults
NONE_OF_THEM = 0.0  # log-odds of a cause that is not in the catalogue


@dataclass
class Evidence:
    """What is known: verdicts by check id, suspects by check id, and what probes said of a cause (log-odds)."""

    red: dict[str, Result]
    green: set[str]
    suspects: dict[str, tuple[str, ...]] = field(default_factory=dict)
    probed: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @classmethod
    def of(cls, results: Sequence[Result]) -> Evidence:
        """The evidence in a list of results; blocked and inapplicable checks say nothing."""
        return cls(
            red={r.id: r for r in results if r.status in RED},
            green={r.id for r in results if r.status in GREEN},
            suspects={r.id: r.suspects for r in results if r.suspects},
        )

    def without(self, explained: Iterable[str]) -> Evidence:
        """The same with some red checks left out: what another cause would have to explain."""
        gone = set(explained)
        return Evidence(
            {id: r for id, r in self.red.items() if id not in gone},
            self.green,
            {id: names for id, names in self.suspects.items() if id not in gone},
            self.probed,
        )


def predicted(cause: CauseEntry, check: str) -> float:
    """How reliably the cause turns the check red."""
    if check in cause.shows:
        return RELIABILITY[cause.shows[check]]
    return SPARED if check in cause.spares else UNNAMED


def log_odds(cause: CauseEntry, evidence: Evidence) -> float:
    """How much better this cause explains the verdicts than an unknown one does."""
    families: dict[str, list[float]] = defaultdict(list)
    for check in evidence.red:
        families[check.partition(".")[0]].append(math.log(predicted(cause, check) / BACKGROUND))
    for check in evidence.green:
        if check in cause.shows:
            families[check.partition(".")[0]].append(math.log((1 - predicted(cause, check)) / (1 - BACKGROUND)))
    total = sum(sum(terms) / math.sqrt(len(terms)) for terms in families.values())
    return total + _suspicion(cause.id, evidence) + evidence.probed.get(cause.id, 0.0)


def _suspicion(cause: str, evidence: Evidence) -> float:
    votes = sorted(
        (
            SUSPECT[min(names.index(cause), len(SUSPECT) - 1)]
            for check, names in evidence.suspects.items()
            if cause in names and check in evidence.red
        ),
        reverse=True,
    )
    return sum(vote * FURTHER**place for place, vote in enumerate(votes))


def explained(cause: CauseEntry, evidence: Evidence) -> list[str]:
    """The red checks that the cause accounts for."""
    return [
        check
        for check in evidence.red
        if cause.shows.get(check) is not None or cause.id in evidence.suspects.get(check, ())
    ]


def rank(causes: Iterable[CauseEntry], evidence: Evidence, most: int = 5) -> list[tuple[CauseEntry, float]]:
    """Causes with scores (0 to 1), likeliest first.

    The first is the one that explains all verdicts best. Where it leaves red checks unexplained, the one that explains
    the rest best comes next: two faults at once are then both named.
    """
    if not evidence.red:
        return []
    entries = list(causes)
    scores = _softmax({cause.id: log_odds(cause, evidence) for cause in entries})
    by_id = {cause.id: cause for cause in entries}
    order = sorted(entries, key=lambda cause: -scores[cause.id])
    first = order[0]
    rest = evidence.without(explained(first, evidence))
    if rest.red:
        others = {cause.id: log_odds(cause, rest) for cause in entries if cause is not first}
        share = _softmax(others)
        second = by_id[max(others, key=lambda id: others[id])]
        if others[second.id] > 0:
            order.remove(second)
            order.insert(1, second)
            scores[second.id] = max(scores[second.id], min(share[second.id], scores[first.id]))
    return [(cause, scores[cause.id]) for cause in order[:most]]


def _softmax(values: Mapping[str, float]) -> dict[str, float]:
    top = max([*values.values(), NONE_OF_THEM])
    weights = {id: math.exp((value - top) / TEMPERATURE) for id, value in values.items()}
    total = sum(weights.values()) + math.exp((NONE_OF_THEM - top) / TEMPERATURE)
    return {id: weight / total for id, weight in weights.items()}
