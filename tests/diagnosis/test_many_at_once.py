"""A model with a dozen faults: each is judged by its own red checks, since no cause explains them all."""

from __future__ import annotations

from lmconform.diagnosis import diagnose
from lmconform.results import Result, Status

RED = {
    "causality.no_future_leak": ("mask.missing",),
    "causality.train_mode": ("mask.missing",),
    "positions.order_matters": ("position.absent",),
    "collapse.labels": ("data.rolled_labels",),
    "training.lr_sweep": ("lr.too_small",),
    "tokenizer.flags": ("tokenizer.flags_ignored",),
    "generation.controls": ("generation.penalty_sign",),
    "batching.permutation": ("batch.cross_row",),
}


def test_all_are_named_with_scores_that_mean_something() -> None:
    results = [
        Result(id, id.partition(".")[0], "fault", Status.failed, message="differs", suspects=suspects)
        for id, suspects in RED.items()
    ]
    causes = {cause.id: cause for cause in diagnose(results)}
    assert set(causes) <= {suspect for suspects in RED.values() for suspect in suspects}
    assert len(causes) == 5
    assert all(cause.score > 0.5 for cause in causes.values())
    assert {"causality.no_future_leak", "causality.train_mode"} <= {e["check"] for e in causes["mask.missing"].evidence}
