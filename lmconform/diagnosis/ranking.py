"""Differential diagnosis: how well each cause explains all results together.

A naive Bayes over verdicts: each cause predicts for each check how reliably it turns it red (causes.toml); red and
green results shift the odds against a background in which any check may be red. Verdicts of one family speak of much
the same thing, so a family's evidence counts as a root of its size. On top, a check that measured more than red or
green (the shape of a leak, the step at which a cache errs) names suspects, and probes speak for a cause or against it.

The figures in `Weights` were fitted on one half of the planted faults (docs/kills.md): docs/tune_ranking.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lmconform.diagnosis.catalogue import CauseEntry
from lmconform.diagnosis.probes import Finding, Verdict
from lmconform.results import Result, Status, of_the_instrument, of_the_process

RED = (Status.failed, Status.warned, Status.error)
GREEN = (Status.passed,)


@dataclass(frozen=True)
class Weights:
    """How much each kind of evidence counts. Probabilities that a check is red; the rest are log-odds."""

    always: float = 0.95  # the catalogue says that the cause turns the check red, in these words
    often: float = 0.6
    sometimes: float = 0.25
    unnamed: float = 0.005  # the catalogue does not connect the check with the cause
    spared: float = 0.004  # the catalogue says that the cause leaves it green
    crash: float = 0.0  # of the weight of a red check that says nothing of the cause, where it is red by an exception
    background: float = 0.12  # some other cause turns the check red
    root: float = 0.6  # evidence of n checks of one family counts as n**root checks
    suspects: tuple[float, float, float] = (6.0, 3.0, 2.0)  # a red check's first, second and further suspect
    unsuspected: float = -0.6  # a red check names suspects, and this cause is none of them
    further: float = 0.2  # what each further check's suspicion adds, as a share of the one before
    cured: float = 8.0  # a probe undid the suspected fault, and the error was gone; so much against a cause ruled out
    seen: float = 4.0  # a probe measured what this cause does and others do not
    agrees: float = 0.0
    speaks_against: float = -3.0
    nothing_known: float = -1.0  # a cause that is not in the catalogue
    temperature: float = 0.85  # of the softmax that turns log-odds into scores

    def probability(self, word: str) -> float:
        return {"always": self.always, "often": self.often, "sometimes": self.sometimes}[word]

    def verdict(self, verdict: Verdict) -> float:
        known = {
            Verdict.cured: self.cured,
            Verdict.seen: self.seen,
            Verdict.agrees: self.agrees,
            Verdict.against: self.speaks_against,
            Verdict.ruled_out: -self.cured,
        }
        return known.get(verdict, 0.0)


FAULTS_AT_ONCE = 3  # so many places of the ranking are given to what the causes before leave unexplained
WEIGHTS = Weights()
RELIABILITY = {word: WEIGHTS.probability(word) for word in ("always", "often", "sometimes")}


@dataclass
class Evidence:
    """What is known: verdicts and suspects by check id, and what probes found."""

    red: dict[str, Result]
    green: set[str]
    suspects: dict[str, tuple[str, ...]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @classmethod
    def of(cls, results: Sequence[Result], findings: Sequence[Finding] = ()) -> Evidence:
        """The evidence in a list of results. Blocked and inapplicable checks say nothing, nor do lmconform's errors."""
        red = {r.id: r for r in results if r.status in RED and not of_the_process(r) and not of_the_instrument(r)}
        return cls(
            red=red,
            green={r.id for r in results if r.status in GREEN},
            suspects={id: r.suspects for id, r in red.items() if r.suspects},
            findings=list(findings),
        )

    def without(self, explained: Iterable[str]) -> Evidence:
        """The same with some red checks left out: what another cause would have to explain."""
        gone = set(explained)
        return Evidence(
            {id: r for id, r in self.red.items() if id not in gone},
            self.green,
            {id: names for id, names in self.suspects.items() if id not in gone},
            self.findings,
        )


def predicted(cause: CauseEntry, check: str, weights: Weights = WEIGHTS) -> float:
    """How reliably the cause turns the check red."""
    if check in cause.shows:
        return weights.probability(cause.shows[check])
    return weights.spared if check in cause.spares else weights.unnamed


def log_odds(cause: CauseEntry, evidence: Evidence, weights: Weights = WEIGHTS) -> float:
    """How much better this cause explains the evidence than an unknown one does."""
    families: dict[str, list[float]] = defaultdict(list)
    for check in evidence.red:
        term = math.log(predicted(cause, check, weights) / weights.background)
        crashed = evidence.red[check].status == Status.error and check not in cause.shows
        families[check.partition(".")[0]].append(weights.crash * term if crashed else term)
    for check in cause.shows:
        if check in evidence.green:
            spared = (1 - predicted(cause, check, weights)) / (1 - weights.background)
            families[check.partition(".")[0]].append(math.log(spared))
    total = sum(sum(terms) * len(terms) ** (weights.root - 1) for terms in families.values())
    probed = sum(weights.verdict(finding.verdict) for finding in evidence.findings if finding.cause == cause.id)
    return total + _suspicion(cause.id, evidence, weights) + probed


def _suspicion(cause: str, evidence: Evidence, weights: Weights) -> float:
    votes, passed_over = [], 0
    for names in evidence.suspects.values():
        if cause in names:
            votes.append(weights.suspects[min(names.index(cause), len(weights.suspects) - 1)])
        else:
            passed_over += 1
    named = sum(vote * weights.further**place for place, vote in enumerate(sorted(votes, reverse=True)))
    return named + weights.unsuspected * math.sqrt(passed_over)


def explained(cause: CauseEntry, evidence: Evidence) -> list[str]:
    """The red checks that the cause accounts for."""
    return [check for check in evidence.red if check in cause.shows or cause.id in evidence.suspects.get(check, ())]


def accounted_for(cause: CauseEntry, evidence: Evidence) -> list[str]:
    """Those that need no other cause: not those that it turns red sometimes and that suspect others alone."""
    return [
        check
        for check in explained(cause, evidence)
        if cause.id in evidence.suspects.get(check, (cause.id,)) or cause.shows[check] != "sometimes"
    ]


def rank(
    causes: Iterable[CauseEntry], evidence: Evidence, most: int = 5, weights: Weights = WEIGHTS
) -> list[tuple[CauseEntry, float]]:
    """Causes with scores (0 to 1), likeliest first.

    The first is the one that explains all evidence best. Where it leaves red checks unexplained, the one that explains
    the rest best comes next, and so on: faults that are there at once are then all named. Where so many are there that
    no cause explains all of it better than an unknown one, each is judged by its own red checks alone.
    """
    if not evidence.red:
        return []
    entries = list(causes)
    odds = {cause.id: log_odds(cause, evidence, weights) for cause in entries}
    if max(odds.values()) <= weights.nothing_known and (several := _by_their_own(entries, evidence, most, weights)):
        return several
    scores = _softmax(odds, weights)
    by_id = {cause.id: cause for cause in entries}
    order = sorted(entries, key=lambda cause: -scores[cause.id])
    rest = evidence
    for place in range(1, FAULTS_AT_ONCE):
        rest = rest.without(accounted_for(order[place - 1], rest))
        if not rest.red:
            break
        others = {cause.id: log_odds(cause, rest, weights) for cause in order[place:]}
        best = by_id[max(others, key=lambda id: others[id])]
        if others[best.id] <= weights.nothing_known:
            break
        order.remove(best)
        order.insert(place, best)
        share = _softmax(others, weights)[best.id]
        scores[best.id] = max(scores[best.id], min(share, scores[order[place - 1].id]))
    return [(cause, scores[cause.id]) for cause in order[:most]]


def _by_their_own(
    entries: Sequence[CauseEntry], evidence: Evidence, most: int, weights: Weights
) -> list[tuple[CauseEntry, float]]:
    """Many faults at once: again and again the cause that explains its own red checks best, then the checks left over.

    A score is the share among all causes for the checks that this one explains.
    """
    ranked: list[tuple[CauseEntry, float]] = []
    rest, left = evidence, list(entries)
    while rest.red and len(ranked) < most:
        own = {cause.id: rest.without(set(rest.red) - set(explained(cause, rest))) for cause in left}
        odds = {cause.id: log_odds(cause, own[cause.id], weights) for cause in left if own[cause.id].red}
        if not odds or max(odds.values()) <= weights.nothing_known:
            break
        best = next(cause for cause in left if cause.id == max(odds, key=lambda id: odds[id]))
        rivals = {cause.id: log_odds(cause, own[best.id], weights) for cause in left}
        ranked.append((best, _softmax(rivals, weights)[best.id]))
        rest = rest.without(accounted_for(best, rest) or explained(best, rest))
        left.remove(best)
    return sorted(ranked, key=lambda pair: -pair[1])


def _softmax(values: Mapping[str, float], weights: Weights) -> dict[str, float]:
    top = max([*values.values(), weights.nothing_known])
    shares = {id: math.exp((value - top) / weights.temperature) for id, value in values.items()}
    total = sum(shares.values()) + math.exp((weights.nothing_known - top) / weights.temperature)
    return {id: share / total for id, share in shares.items()}
