"""Monitors: they watch a training run and name what goes wrong while it goes wrong, with the cause's id.

With transformers' Trainer they are callbacks; in a loop written by hand, call `step` once per optimizer step, after
backward() and before clipping and `optimizer.step()`:

    monitors = lmconform.monitors.standard(eos_token_id=tokenizer.eos_token_id, log="monitors.jsonl")
    trainer = Trainer(..., callbacks=monitors)

    for alert in monitors.step(
        model=model, optimizer=optimizer, logits=logits, labels=labels, input_ids=ids, loss=loss
    ):
        print(alert)
"""

from __future__ import annotations

from lmconform.monitors.base import Alert, Monitor, Monitors
from lmconform.monitors.collapse import CollapseMonitor
from lmconform.monitors.gradients import GradientMonitor
from lmconform.monitors.rates import EffectiveRateMonitor
from lmconform.monitors.replicas import ReplicaMonitor
from lmconform.monitors.samples import SampleMonitor, Sampler, generated
from lmconform.monitors.updates import UpdateMonitor

__all__ = [
    "Alert", "CollapseMonitor", "EffectiveRateMonitor", "GradientMonitor", "Monitor", "Monitors", "ReplicaMonitor",
    "SampleMonitor", "UpdateMonitor", "generated", "standard",
]  # fmt: skip


def standard(
    *,
    eos_token_id: int | None = None,
    every: int = 10,
    stop: bool = False,
    log: str | None = None,
    sample: Sampler | None = None,
    sample_every: int | None = None,
) -> Monitors:
    """All six, writing to one file. `log` is appended to: one JSON object a line.

    `every` is CollapseMonitor's; gradients and updates are looked at half as often, which keeps the whole cheap.
    Samples are looked at where a loop gives `samples`, or are drawn by `sample` (see `generated`), every
    `sample_every` steps: set it, drawing costs far more than looking.
    """
    return Monitors(
        [
            CollapseMonitor(eos_token_id=eos_token_id, every=every, stop=stop, log=log),
            GradientMonitor(every=2 * every, stop=stop, log=log),
            UpdateMonitor(every=2 * every, stop=stop, log=log),
            EffectiveRateMonitor(stop=stop, log=log),
            ReplicaMonitor(every=5 * every, stop=stop, log=log),
            SampleMonitor(sample, every=sample_every or every, stop=stop, log=log),
        ]
    )
