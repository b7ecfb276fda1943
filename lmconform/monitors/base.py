"""What all monitors share: when they look, what they are shown, how they warn, stop and write."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger("lmconform.monitors")


@dataclass(frozen=True)
class Alert:
    """One warning: the cause's id, what was seen, and what to do. `evidence` holds the figures."""

    step: int
    cause: str
    message: str
    mend: str
    evidence: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"step {self.step}: {self.cause}: {self.message}. {self.mend}"


@dataclass
class Moment:
    """What a monitor is shown of one optimizer step; None where the loop did not give it.

    `step` counts optimizer steps from 1. Gradients are there and the weights have not moved yet. `total` and
    `epochs` are the run's length, and the epochs behind it, where known.
    """

    step: int
    model: nn.Module | None = None
    optimizer: Any = None
    scheduler: Any = None
    loss: float | Tensor | None = None
    logits: Tensor | None = None
    input_ids: Tensor | None = None
    labels: Tensor | None = None
    attention_mask: Tensor | None = None
    total: int | None = None
    epochs: float | None = None
    samples: Any = None
    gradient_norms: dict[str, Tensor] | None = None  # before clipping, where the loop clips by itself


class Monitor(TrainerCallback):
    """Looks every `every` optimizer steps. Subclasses write `observe`, and may raise alerts with `warn`.

    `stop`: end the run at the first alert (the Trainer stops by itself; a hand-written loop reads `stopped`).
    `log`: a file to which observations and alerts are appended as JSON lines, by the first process only.
    An alert is raised once per cause.
    """

    wants_logits = False  # whether the Trainer's forward calls are watched
    wants_gradients = False
    follows = False  # whether `follow` is to be called at every step

    def __init__(self, *, every: int = 10, stop: bool = False, log: str | Path | None = None) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        self.every = every
        self.stop = stop
        self.log = Path(log) if log is not None else None
        self.alerts: list[Alert] = []
        self.observations: list[dict[str, Any]] = []
        self.stopped = False
        self.steps = 0
        self._pending: list[str] = []  # lines not yet written
        self._streaks: dict[str, int] = {}
        self._seen: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._loss: float | None = None
        self._armed = False
        self._fp16 = False
        self._norms: dict[str, Tensor] = {}

    # -- the two ways in -------------------------------------------------------------------------------------------

    def step(self, **seen: Any) -> list[Alert]:
        """One optimizer step of a hand-written loop: after backward(), before clipping and `optimizer.step()`.

        Keywords are the fields of `Moment`: model, optimizer, scheduler, loss, logits, labels, input_ids,
        attention_mask, total, epochs, samples. `labels` are as the model's own: position t holds token t, -100 is not
        counted. Returns the alerts that this step raised. Raises TypeError for an unknown keyword.
        """
        self.steps += 1
        if not self.follows and not self.due(self.steps):
            return []
        return self._look(Moment(step=self.steps, **seen))

    def due(self, step: int) -> bool:
        """Whether this step is looked at: the first, and then every `every`-th."""
        return step == 1 or step % self.every == 0

    def observe(self, moment: Moment) -> dict[str, Any] | None:
        """Measure, warn, and return the figures to be written; None where there is nothing to see."""
        raise NotImplementedError

    def follow(self, moment: Moment) -> None:
        """Called at every step where `follows` is set: for what cannot be skipped. It must cost next to nothing."""

    def _look(self, moment: Moment) -> list[Alert]:
        before = len(self.alerts)
        if self.follows:
            self.follow(moment)
        if self.due(moment.step):
            figures = self.observe(moment)
            if figures is not None:
                self.observations.append({"step": moment.step, **figures})
                self._write({"step": moment.step, "monitor": type(self).__name__, **figures})
        if self._pending and (len(self.alerts) > before or len(self._pending) >= 20):
            self.flush()
        return self.alerts[before:]

    # -- warning ---------------------------------------------------------------------------------------------------

    def warn(self, moment: Moment, cause: str, message: str, mend: str, **evidence: Any) -> None:
        """Raise an alert, once per cause."""
        if any(alert.cause == cause for alert in self.alerts):
            return
        alert = Alert(moment.step, cause, message, mend, evidence)
        self.alerts.append(alert)
        self.stopped = self.stopped or self.stop
        logger.warning("%s", alert)
        self._write({"monitor": type(self).__name__, "alert": asdict(alert)})

    def lasting(self, what: str, true: bool, times: int = 3) -> bool:
        """Whether `true` has now been so at `times` observations in a row: one odd batch is no evidence."""
        self._streaks[what] = self._streaks.get(what, 0) + 1 if true else 0
        return self._streaks[what] >= times

    # -- writing ---------------------------------------------------------------------------------------------------

    def _write(self, line: dict[str, Any]) -> None:
        if self.log is not None:
            self._pending.append(json.dumps(_finite(line)))

    def flush(self) -> None:
        """Append what is waiting to the file. Only the first process of a distributed run writes."""
        if self.log is not None and self._pending and rank() == 0:
            with self.log.open("a", encoding="utf-8") as file:
                file.write("\n".join(self._pending) + "\n")
        self._pending.clear()

    # -- transformers.Trainer --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the model's forward calls, where this monitor wants to see them."""
        model = kwargs["model"]
        self._fp16 = bool(getattr(args, "fp16", False))
        if self.wants_logits:
            self._handles.append(model.register_forward_hook(self._forward_seen, with_kwargs=True))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._armed = self.due(state.global_step + 1)
        if self.wants_gradients and self._armed and not self._fp16:  # under fp16 gradients are scaled until clipping
            self._norms = {}
            for name, parameter in kwargs["model"].named_parameters():
                if parameter.requires_grad:
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._grad_seen(name)))

    def _grad_seen(self, name: str) -> Any:
        def seen(parameter: Tensor) -> None:  # with accumulation the last micro-batch leaves the whole sum
            assert parameter.grad is not None
            self._norms[name] = parameter.grad.detach().norm()

        return seen

    def _forward_seen(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and self._armed):
            return
        from lmconform.conventions import IDS
        from lmconform.outputs import read

        ids = next((kwargs[name] for name in IDS if name in kwargs), args[0] if args else None)
        seen = read(output)
        self._seen = {
            "logits": seen.logits.detach(),
            "loss": None if seen.loss is None else seen.loss.detach(),
            "labels": kwargs.get("labels"),
            "input_ids": ids,
            "attention_mask": kwargs.get("attention_mask"),
        }

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The gradients are there, the weights have not moved: the moment a monitor looks at."""
        self.steps = state.global_step + 1
        moment = Moment(
            step=self.steps, model=kwargs["model"], optimizer=kwargs["optimizer"], scheduler=kwargs["lr_scheduler"],
            total=state.max_steps if state.max_steps > 0 else None, epochs=state.epoch, **self._seen,
        )  # fmt: skip
        if moment.loss is None or args.gradient_accumulation_steps > 1:  # a micro-batch's loss is a part only
            moment.loss = self._loss
        if self.wants_gradients and self._armed:
            moment.gradient_norms = self._norms or None
            self._release(keep=1 if self.wants_logits else 0)
        self._look(moment)
        self._seen = {}
        if self.stopped:
            control.should_training_stop = True
            return control
        return None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        value = (logs or {}).get("loss")
        if isinstance(value, int | float):
            self._loss = float(value)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._release()
        self.flush()

    def _release(self, keep: int = 0) -> None:
        for handle in self._handles[keep:]:
            handle.remove()
        del self._handles[keep:]


class Monitors(list[Monitor]):
    """Several monitors: a list for `Trainer(callbacks=...)`, with one `step` for a hand-written loop."""

    def __init__(self, monitors: Iterable[Monitor]) -> None:
        super().__init__(monitors)

    def step(self, **seen: Any) -> list[Alert]:
        """`Monitor.step` of each; the alerts of all."""
        return [alert for monitor in self for alert in monitor.step(**seen)]

    @property
    def alerts(self) -> list[Alert]:
        return sorted((alert for monitor in self for alert in monitor.alerts), key=lambda alert: alert.step)

    @property
    def stopped(self) -> bool:
        return any(monitor.stopped for monitor in self)

    def flush(self) -> None:
        for monitor in self:
            monitor.flush()


def rank() -> int:
    """This process's place in a distributed run; 0 where there is none."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def number(value: float | Tensor | None) -> float | None:
    return None if value is None else float(value)


def _finite(value: Any) -> Any:
    """Non-finite numbers as strings: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
