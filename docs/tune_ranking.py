"""Fits the weights of the diagnosis' ranking on the tuning half: python docs/tune_ranking.py ROWS.

The probabilities that causes.toml defines in words stay as they are defined. Coordinate descent over a grid for each
other weight. What is made small is the mean negative log score of the right cause on
the tuning half, which rewards both the order and scores that mean what they say. Prints the weights for
lmconform/diagnosis/ranking.py; writes nothing.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

if TYPE_CHECKING:
    from fixtures.faults import Fault
    from lmconform.diagnosis.ranking import Evidence, Weights

GRID: dict[str, tuple[float, ...]] = {
    "unnamed": (0.005, 0.01, 0.02, 0.04, 0.06, 0.08),
    "crash": (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0),
    "background": (0.05, 0.08, 0.12, 0.16, 0.2, 0.3),
    "root": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0),
    "suspects": (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0),
    "unsuspected": (-3.0, -2.0, -1.5, -1.0, -0.6, -0.3, 0.0),
    "further": (0.2, 0.35, 0.5, 0.7, 0.85),
    "cured": (2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
    "seen": (1.5, 2.5, 3.5, 5.0, 7.0),
    "agrees": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0),
    "speaks_against": (-5.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5),
    "nothing_known": (-2.0, -1.0, 0.0, 1.0),
    "temperature": (0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0),
}
ROUNDS = 8
FOLDS = 4
WORTH = 0.004  # a weight is moved for no less: with one or two faults a mechanism the last hundredths are chance
WORDS = ("always", "often", "sometimes")
KINDS = (*WORDS, "unnamed", "spared", "crashed", "crashed_spared")
VERDICTS = ("cured", "seen", "agrees", "against", "ruled_out")


class Features:
    """What `lmconform.diagnosis.ranking.log_odds` looks at, counted once for all weights: [fault, cause, ...]."""

    def __init__(self, cases: list[tuple[Fault, Evidence]]) -> None:
        from lmconform.diagnosis.catalogue import catalogue
        from lmconform.registry import FAMILIES

        causes = list(catalogue().values())
        place = {family: number for number, family in enumerate(FAMILIES)}
        shape = (len(cases), len(causes))
        self.red = np.zeros((*shape, len(FAMILIES), len(KINDS)))
        self.green = np.zeros((*shape, len(FAMILIES), len(WORDS)))
        self.votes = np.zeros((*shape, 3))
        self.passed = np.zeros(shape)
        self.probed = np.zeros((*shape, len(VERDICTS)))
        self.right = np.zeros(shape, dtype=bool)
        for row, (fault, evidence) in enumerate(cases):
            for column, cause in enumerate(causes):
                self.right[row, column] = cause.id in (fault.cause, *fault.also)
                for check, result in evidence.red.items():
                    word = cause.shows.get(check, "spared" if check in cause.spares else "unnamed")
                    if check not in cause.shows and result.status.value == "error":
                        word = "crashed" if word == "unnamed" else "crashed_spared"
                    self.red[row, column, place[check.partition(".")[0]], KINDS.index(word)] += 1
                for check, word in cause.shows.items():
                    if check in evidence.green:
                        self.green[row, column, place[check.partition(".")[0]], WORDS.index(word)] += 1
                for names in evidence.suspects.values():
                    if cause.id in names:
                        self.votes[row, column, min(names.index(cause.id), 2)] += 1
                    else:
                        self.passed[row, column] += 1
                for finding in evidence.findings:
                    if finding.cause == cause.id and finding.verdict.value in VERDICTS:
                        self.probed[row, column, VERDICTS.index(finding.verdict.value)] += 1

    def loss(self, weights: Weights) -> float:
        """The mean negative log score of the right cause."""
        from lmconform.diagnosis.probes import Verdict

        rates = np.array([getattr(weights, kind) for kind in KINDS[:5]])
        spared = np.log((1 - rates[:3]) / (1 - weights.background))
        shown = np.log(rates / weights.background)
        terms = self.red @ np.concatenate([shown, weights.crash * shown[3:]]) + self.green @ spared
        count = self.red.sum(-1) + self.green.sum(-1)
        odds = (terms * np.maximum(count, 1) ** (weights.root - 1)).sum(-1)
        before = np.zeros(odds.shape)
        for kind in np.argsort(weights.suspects)[::-1]:
            many = self.votes[..., kind]
            shares = (weights.further**before) * (1 - weights.further**many) / (1 - weights.further)
            odds += weights.suspects[kind] * shares
            before += many
        odds += weights.unsuspected * np.sqrt(self.passed)
        odds += self.probed @ np.array([weights.verdict(Verdict(name)) for name in VERDICTS])
        scaled = odds / weights.temperature
        top = np.maximum(scaled.max(1), weights.nothing_known / weights.temperature)
        total = np.exp(scaled - top[:, None]).sum(1) + np.exp(weights.nothing_known / weights.temperature - top)
        right = np.where(self.right, scaled, -np.inf).max(1)
        return float(np.minimum(np.log(total) + top - right, 6.0).mean())


def variants(weights: Weights, name: str) -> list[Weights]:
    """The weights with one of them changed, in every way of the grid."""
    if name != "suspects":
        return [replace(weights, **{name: value}) for value in GRID[name]]
    made: list[Any] = []
    for place in range(3):
        for value in GRID[name]:
            changed = list(weights.suspects)
            changed[place] = value
            if changed == sorted(changed, reverse=True):
                made.append(replace(weights, suspects=tuple(changed)))
    return made


def tuned(features: Features, weights: Weights) -> Weights:
    """The best weights found, one at a time, until a round changes nothing."""
    best = features.loss(weights)
    for number in range(ROUNDS):
        before = best
        for name in GRID:
            for changed in variants(weights, name):
                if (found := features.loss(changed)) < best - WORTH:
                    best, weights = found, changed
        print(f"round {number + 1}: {best:.4f}", flush=True)
        if before - best < WORTH:
            break
    return weights


def crosswise(cases: list[tuple[Fault, Evidence]], weights: Weights) -> float:
    """The temperature at which scores hold on mechanisms that the weights were not fitted on: in four folds."""
    from kill_figures import digest, mechanism_group

    folds: list[list[tuple[Fault, Evidence]]] = [[] for _ in range(FOLDS)]
    for fault, evidence in cases:
        if evidence.red:
            folds[digest("fold " + mechanism_group(fault)) % FOLDS].append((fault, evidence))
    losses = dict.fromkeys(GRID["temperature"], 0.0)
    for number, fold in enumerate(folds):
        others = Features([case for other in range(FOLDS) if other != number for case in folds[other]])
        fitted, held = tuned(others, weights), Features(fold)
        for value in losses:
            losses[value] += len(fold) * held.loss(replace(fitted, temperature=value))
    print("temperature, held crosswise: " + ", ".join(f"{k:g} {v / len(cases):.3f}" for k, v in losses.items()))
    return min(losses, key=lambda value: losses[value])


def main() -> None:
    from kill_figures import evidence_of, judge, last, share, tuning
    from measure_kills import read

    from fixtures.faults import all_faults
    from lmconform.diagnosis.ranking import WEIGHTS

    rows = read(Path(sys.argv[1]))
    faults = [f for f in all_faults() if f.id in rows and tuning(f) and f.id not in last()]
    cases = [(fault, evidence_of(rows[fault.id])) for fault in faults]
    features = Features([(fault, evidence) for fault, evidence in cases if evidence.red])
    print(f"{len(features.right)} faults to tune on; before: {features.loss(WEIGHTS):.4f}")
    weights = tuned(features, WEIGHTS)
    weights = replace(weights, temperature=crosswise(cases, weights))
    print(weights)
    judged = judge(faults, rows, weights)
    print(f"tuning half: first {share(judged, 1):.3f}, first three {share(judged, 3):.3f}")


if __name__ == "__main__":
    main()
