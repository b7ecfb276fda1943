"""EffectiveRateMonitor: the rate the optimizer really uses against the one the recipe promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmconform.monitors.base import Moment, Monitor

if TYPE_CHECKING:
    from lmconform.recipe import Recipe

APART = 0.01  # relative
STARVED = 0.1


class EffectiveRateMonitor(Monitor):
    """Reads `lr` of the parameter groups at every other step, and compares with the schedule's closed form.

    `schedule(step) -> factor` and `learning_rate` give the closed form, in optimizer steps from 0; without
    them the scheduler's own lambda is evaluated at the true number of steps, so that a schedule made for steps and
    stepped once per epoch shows. `interval="epoch"`: the schedule is meant to be stepped per epoch. A `Recipe` gives
    all three. Of several parameter groups the first is compared.
    """

    def __init__(
        self,
        *,
        schedule: Callable[[float], float] | None = None,
        learning_rate: float | None = None,
        interval: str = "step",
        recipe: Recipe | None = None,
        every: int = 2,
        stop: bool = False,
        log: str | Path | None = None,
    ) -> None:
        super().__init__(every=every, stop=stop, log=log)
        if recipe is not None:
            learning_rate = recipe.learning_rate if learning_rate is None else learning_rate
            schedule = recipe.closed_form() if schedule is None and learning_rate is not None else schedule
            interval = recipe.interval
        if schedule is not None and learning_rate is None:
            raise ValueError("a schedule is a factor: give learning_rate, which it multiplies, too")
        self.schedule = schedule
        self.learning_rate = learning_rate
        self.interval = interval

    def observe(self, moment: Moment) -> dict[str, Any] | None:
        if moment.optimizer is None:
            return None
        used = float(moment.optimizer.param_groups[0]["lr"])
        promised = self._closed_form(moment)
        scheduler = getattr(moment.scheduler, "scheduler", moment.scheduler)  # accelerate wraps it
        counter = getattr(scheduler, "last_epoch", None)
        figures: dict[str, Any] = {"lr": used, "promised": promised, "scheduler_steps": counter}
        if promised is None:
            return figures if moment.step % 10 in (0, 1) else None
        apart = abs(used - promised) > APART * max(abs(promised), abs(used))
        if apart:
            self._judge(moment, used, promised, counter)
        else:
            self._streaks.clear()
        return figures if apart or moment.step % 10 in (0, 1) else None

    def _closed_form(self, moment: Moment) -> float | None:
        """The promised rate at this step; None where nothing promises one."""
        done = moment.step - 1
        if self.schedule is not None:
            assert self.learning_rate is not None
            return self.learning_rate * float(self.schedule(done))
        scheduler = getattr(moment.scheduler, "scheduler", moment.scheduler)
        lambdas = getattr(scheduler, "lr_lambdas", None)
        if lambdas and self.interval == "step" and callable(lambdas[0]):
            return float(scheduler.base_lrs[0]) * float(lambdas[0](done))
        return self.learning_rate if moment.scheduler is None else None

    def _judge(self, moment: Moment, used: float, promised: float, counter: int | None) -> None:
        lagging = counter is not None and self.interval == "step" and counter < (moment.step - 1) // 2
        starved = used < STARVED * promised
        evidence = {"lr": used, "promised": promised, "scheduler_steps": counter, "optimizer_steps": moment.step - 1}
        if self.lasting("lag", lagging and (starved or self.schedule is not None), times=10):
            epochs = "" if moment.epochs is None else f", after {moment.epochs:.3g} epochs"
            self.warn(
                moment, "lr.schedule_per_epoch",
                f"the schedule has been stepped {counter} times in {moment.step - 1} optimizer steps{epochs}: the rate "
                f"is {used:.3g} where {promised:.3g} is due",
                "Call scheduler.step() after every optimizer.step(), not once per epoch: its warm-up is counted in "
                "steps.", **evidence,
            )  # fmt: skip
            return
        if lagging:
            return
        if self.lasting("low", starved, times=10):
            self.warn(
                moment, "lr.too_small", f"the optimizer uses a rate of {used:.3g} where {promised:.3g} is due",
                "Look at what multiplies it: two schedules at once, a factor instead of a rate, a scheduler stepped "
                "per micro-batch, or a group that was added later.", **evidence,
            )  # fmt: skip
        elif self.lasting("high", promised < STARVED * used, times=10):
            self.warn(
                moment, "lr.too_large", f"the optimizer uses a rate of {used:.3g} where {promised:.3g} is due",
                "The schedule does not reach this optimizer: it was built on another one, or the warm-up is skipped.",
                **evidence,
            )  # fmt: skip
        elif self.lasting("other", True, times=10):
            self.warn(
                moment, "lr.not_applied", f"the optimizer uses a rate of {used:.3g} where {promised:.3g} is due",
                "Compare the length, the warm-up and the decay that the scheduler was built with.", **evidence,
            )  # fmt: skip
