"""training.schedule: the effective rate, step by step, against the closed form. Nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmconform import charts, tolerance
from lmconform.checks.training_optimizer import made_optimizers
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.recipe import WORDS
from lmconform.registry import register_check
from lmconform.schedules import ClosedForm

if TYPE_CHECKING:
    from lmconform.context import Context
    from lmconform.recipe import Recipe
    from lmconform.specimen import Specimen

LONGEST = 10_000  # optimizer steps that are stepped through; thorough: all of them
ALL = 1_000_000
STARVED = 1e-2  # a schedule that never reaches this share of the optimizer's rate in the whole run
GAIN = 10.0  # and would reach so many times more if it were stepped by optimizer step


@register_check(
    "training.schedule",
    holds="the effective rate per optimizer step equals the closed form; warm-up, decay and accumulation counted in "
    "optimizer steps",
    needs=("recipe",),
    requires=(),
)
def check_schedule(subject: Specimen, ctx: Context) -> None:
    """The scheduler is stepped as the recipe's interval says, and the rate that the optimizer holds is read each step.

    Without a stated closed form: the rate must follow the scheduler, and a schedule built from a number of optimizer
    steps must not be stepped by epoch. The report "learning rate 3e-4 is too small" was this: a Noam factor times 3e-4,
    stepped once per epoch.
    """
    recipe = subject.recipe
    recipe.need("make_scheduler")
    _check_lengths(ctx, recipe)
    total = recipe.steps()
    if total is None:
        ctx.not_applicable(f"the recipe gives no {WORDS['total_steps']}")
    assert total is not None
    if recipe.interval == "epoch" and recipe.steps_each_epoch() is None:
        ctx.not_applicable(f"the recipe gives no {WORDS['steps_per_epoch']}")
    steps = min(total, ALL if ctx.profile == "thorough" else LONGEST)
    if steps < total:
        ctx.note(f"the first {steps} of {total} optimizer steps were looked at")
    run = Run(subject, ctx, recipe, total)
    rates = run.rates(steps, recipe.interval)
    _check_applied(ctx, run, rates)
    form = recipe.closed_form()
    base = run.base[run.largest]
    curve = [row[run.largest] for row in rates]
    lines = {"the optimizer's rate": curve}
    if form is not None:
        lines["closed form"] = [base * form(step) for step in range(steps)]
    ctx.record(charts.curves("Learning rate by step", "optimizer step", "learning rate", lines))
    if form is None:
        _check_without_form(ctx, recipe, run, curve, steps)
        return
    for group, own in enumerate(run.base):
        _compare(ctx, recipe, [row[group] for row in rates], own, form, group, len(run.base))
    ctx.note(f"rate from {min(curve):.3g} to {max(curve):.3g} over {steps} optimizer steps, {base:.3g} times the form")


class Run:
    """An optimizer and its scheduler, stepped as a training loop would, without a gradient."""

    def __init__(self, subject: Specimen, ctx: Context, recipe: Recipe, total: int) -> None:
        self.subject, self.ctx, self.recipe, self.total = subject, ctx, recipe, total
        self.per_epoch = recipe.steps_each_epoch() or total
        self.make(total)
        self.largest = max(range(len(self.base)), key=lambda group: self.base[group])
        stated = recipe.learning_rate
        if stated is not None and not any(math.isclose(stated, own, rel_tol=self.unit) for own in self.base):
            ctx.fail(
                f"the recipe states a learning rate of {stated:g}, and the optimizer was built with "
                f"{', '.join(f'{own:g}' for own in dict.fromkeys(self.base))}",
                where="param_groups[0]['lr']",
                hint=Hint(
                    "the rate is not passed on to the optimizer, which then takes its class's default; or the "
                    "scheduler's constructor overwrites it",
                    "lr.not_applied",
                ),
            )

    def make(self, total: int) -> None:
        self.unapplied: tuple[int, float, float] | None = None  # first step at which scheduler and optimizer disagree
        recipe, ctx = self.recipe, self.ctx
        if recipe.make_optimizer is not None:
            self.optimizer = made_optimizers(ctx, recipe, self.subject.copy().module)[0]
        else:
            import torch

            self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate or 1.0)
        groups = self.optimizer.param_groups
        before = [rate_of(ctx, group) for group in groups]
        assert recipe.make_scheduler is not None
        try:
            self.scheduler = recipe.make_scheduler(self.optimizer, total)
        except Exception as error:
            ctx.fail(f"make_scheduler(optimizer, {total}) raised {type(error).__name__}: {first_line(error)}")
        if not callable(getattr(self.scheduler, "step", None)):
            ctx.not_applicable(f"make_scheduler gave {type(self.scheduler).__name__}, which has no step()")
        if "metrics" in _parameters(self.scheduler.step):
            ctx.not_applicable(f"{type(self.scheduler).__name__} follows the measured loss, not the step")
        self.base = [float(group.get("initial_lr", rate)) for group, rate in zip(groups, before)]
        kinds = [group["lr"].dtype for group in groups if hasattr(group["lr"], "dtype")]
        self.unit = tolerance.FACTOR * max([tolerance.epsilon(kind) for kind in kinds], default=2.0**-52)

    def rates(self, steps: int, interval: str) -> list[list[float]]:
        """The rate of each group [step][group], before each optimizer step."""
        made, known = [], getattr(self.scheduler, "get_last_lr", None)
        for step in range(steps):
            made.append([rate_of(self.ctx, group) for group in self.optimizer.param_groups])
            said = [float(rate) for rate in known()] if callable(known) else made[-1]
            if self.unapplied is None and not _alike(said, made[-1], self.unit):
                self.unapplied = step, said[0], made[-1][0]
            if interval == "epoch":
                due = int((step + 1) % self.per_epoch == 0)
            else:
                due = self.recipe.accumulation if interval == "batch" else 1
            for _ in range(due):
                self.scheduler.step()
        return made

    def again(self, total: int, steps: int, interval: str) -> list[float]:
        """The largest group's rates of a run that is built anew, with another length or interval."""
        self.make(total)
        return [row[self.largest] for row in self.rates(steps, interval)]


def rate_of(ctx: Context, group: dict[str, Any]) -> float:
    if group.get("lr") is None:
        ctx.not_applicable("the optimizer chooses its own rate (lr=None)")
    return float(group["lr"])


def _alike(first: list[float], second: list[float], unit: float) -> bool:
    return len(first) == len(second) and all(math.isclose(a, b, rel_tol=unit) for a, b in zip(first, second))


def _parameters(function: Any) -> Any:
    import inspect

    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()


def _check_lengths(ctx: Context, recipe: Recipe) -> None:
    """total_steps counts optimizer steps: with accumulation there are fewer of them than batches."""
    count, total = recipe.batch_count(), recipe.total_steps
    if recipe.accumulation == 1 or count is None or total is None or not recipe.epochs:
        return
    micro = math.ceil(count * recipe.epochs)
    real = math.ceil(math.ceil(count / recipe.accumulation) * recipe.epochs)
    if total == micro and total != real:
        ctx.fail(
            f"total_steps counts micro-batches: {total} = {count} batches x {recipe.epochs:g} epochs, but with an "
            f"accumulation of {recipe.accumulation} there are {real} optimizer steps",
            measured=total,
            allowed=real,
            where=f"the run ends after {real / total:.0%} of the schedule",
            hint=Hint(
                "warm-up is as many times too long, and the decay is never reached: divide the number of batches by "
                "the accumulation",
                "lr.not_applied",
            ),
        )


def _check_applied(ctx: Context, run: Run, rates: list[list[float]]) -> None:
    """What the scheduler says is what the optimizer has, in every group, and some rate is not zero."""
    flat = [rate for row in rates for rate in row]
    if not all(math.isfinite(rate) and rate >= 0 for rate in flat):
        step = next(i for i, row in enumerate(rates) if not all(math.isfinite(rate) and rate >= 0 for rate in row))
        ctx.fail(
            f"the rate is {rates[step]}",
            where=f"optimizer step {step}",
            hint=Hint("the formula leaves its range", "lr.not_applied"),
        )
    if not any(flat):
        ctx.fail(
            "the rate is 0 in the whole run: nothing is learnt",
            hint=Hint("a factor in whole numbers, 1 // warmup?", "lr.not_applied"),
        )
    now = rates[-1]
    moving = len({row[run.largest] for row in rates}) > 1
    if run.unapplied is not None:
        step, said, held = run.unapplied
        other = getattr(run.scheduler, "optimizer", run.optimizer) is not run.optimizer
        ctx.fail(
            f"the scheduler's rate is not applied: it says {said:.4g}, the optimizer has {held:.4g}",
            where=f"optimizer step {step}",
            hint=Hint(
                "it was attached to another optimizer than the one that steps: build the scheduler last, on the final "
                "optimizer",
                "lr.not_applied",
            )
            if other
            else Hint("step() computes the rate and does not write it into every group's 'lr'", "lr.not_applied"),
        )
    still = [g for g in range(len(now)) if len({row[g] for row in rates}) == 1]
    if moving and still and not hasattr(run.scheduler, "base_lrs"):
        ctx.fail(
            f"the schedule moves only some parameter groups: group {still[0]} keeps {now[still[0]]:.4g} all along",
            where=f"param_groups[{still[0]}]['lr']",
            hint=Hint(
                "optimizer.param_groups[0]['lr'] = ... sets the first group; loop over all of them", "lr.not_applied"
            ),
        )


def _compare(
    ctx: Context, recipe: Recipe, curve: list[float], base: float, form: Callable[[float], float], group: int, of: int
) -> None:
    """One group's rates against base * form(step), steps counted from 0 or from 1."""
    peak = max(abs(base), max(curve))
    allowed = tolerance.FACTOR * 2.0**-52 * len(curve) * peak  # one rounding per step: chained schedulers add them up
    distances = []
    for origin in (0, 1):
        expected = [base * form(step + origin) for step in range(len(curve))]
        distances.append(max(abs(a - b) for a, b in zip(curve, expected)))
    origin = min((0, 1), key=lambda at: distances[at])
    if distances[origin] <= allowed:
        if origin and distances[0] > allowed:
            ctx.note("the schedule counts steps from 1")
        ctx.within(distances[origin], allowed, "the rate", where=f"param_groups[{group}]")
        return
    wanted = [base * form(step) for step in range(len(curve))]
    what, hint = _explain(recipe, curve, base, form, 4 * allowed)
    step = next(i for i, (a, b) in enumerate(zip(curve, wanted)) if abs(a - b) > allowed)
    ctx.within(
        distances[origin],
        allowed,
        f"the effective rate differs from the closed form ({_name(form, recipe)}){what}; it reaches "
        f"{max(curve):.2g} at most in {len(curve)} optimizer steps, the closed form {max(wanted):.2g}",
        where=f"first at optimizer step {step}: {curve[step]:.4g}, expected {wanted[step]:.4g}"
        + (f" (param_groups[{group}])" if of > 1 else ""),
        hint=hint,
    )


def _name(form: Callable[[float], float], recipe: Recipe) -> str:
    return form.describe() if isinstance(form, ClosedForm) else getattr(form, "__name__", "a function")


def _explain(
    recipe: Recipe, curve: list[float], base: float, form: Callable[[float], float], within: float
) -> tuple[str, str]:
    """Which usual mistake gives exactly this curve: words for the message, and the hint."""
    accumulation = recipe.accumulation
    each = recipe.steps_each_epoch()
    candidates: list[tuple[Callable[[int], float], str, str]] = []
    if each is not None:
        candidates.append((
            lambda step: base * form(step // each),
            "it is stepped once per epoch while its formula counts optimizer steps",
            Hint(
                "call scheduler.step() after every optimizer.step(); per epoch the warm-up lasts "
                f"{each} times as long (in this run it does not end, if it is counted in steps)",
                "lr.schedule_per_epoch",
            ),
        ))  # fmt: skip
    if accumulation > 1:
        slower: Callable[[float], float] = (
            form.stretched(accumulation) if isinstance(form, ClosedForm) else lambda step: form(step / accumulation)
        )
        candidates += [
            (
                lambda step: base * form(step * accumulation),
                f"it runs {accumulation} times too fast: it is stepped once per micro-batch",
                Hint(
                    "step the scheduler where the optimizer steps, once per `accumulation` micro-batches",
                    "lr.not_applied",
                ),
            ),
            (
                lambda step: base * slower(step),
                f"it runs {accumulation} times too slowly: its lengths count micro-batches",
                Hint(
                    "warm-up and total are numbers of optimizer steps: divide the number of batches by the "
                    "accumulation",
                    "lr.not_applied",
                ),
            ),
        ]
    candidates += [
        (
            lambda step: base,
            "it never moves: the scheduler is not stepped, or not attached",
            Hint(
                "call scheduler.step() after every optimizer.step(), on the scheduler of this optimizer",
                "lr.not_applied",
            ),
        ),
        (
            lambda step: base * base * form(step),
            "the learning rate enters twice",
            Hint(
                "LambdaLR multiplies the optimizer's rate by what the function returns: return a factor, not a rate",
                "lr.too_small",
            ),
        ),
        (
            lambda step: form(step),
            "the optimizer's own rate is left out",
            Hint("the factor is set as the rate; multiply it by the learning rate", "lr.too_large"),
        ),
    ]
    for candidate, what, hint in candidates:
        for origin in (0, 1):
            if all(abs(candidate(step + origin) - rate) <= within for step, rate in enumerate(curve)):
                return f": {what}", hint
    return "", Hint(
        "compare the two curves: the step at which the warm-up ends, the step at which the decay ends (optimizer "
        "steps, not batches, not epochs), and the last value",
        "lr.not_applied",
    )


def _check_without_form(ctx: Context, recipe: Recipe, run: Run, curve: list[float], steps: int) -> None:
    """No closed form is stated: what the schedule depends on, and whether the rate ever gets near the optimizer's."""
    base, peak = run.base[run.largest], max(curve)
    ctx.note(
        f"no closed form is stated (recipe.schedule): rate from {min(curve):.3g} to {peak:.3g} over {steps} optimizer "
        f"steps, the optimizer's own is {base:.3g}"
    )
    if recipe.interval == "epoch":
        calls = max(1, steps // run.per_epoch)
        by_step = run.again(run.total, steps, "step")
        if peak < STARVED * base and max(by_step) > GAIN * peak:
            ctx.fail(
                f"the schedule is stepped once per epoch while its formula counts optimizer steps: the effective rate "
                f"stays below {peak:.1e} in the whole run (the optimizer's own rate is {base:.1e})",
                where=f"{calls} epochs of {run.per_epoch} optimizer steps",
                measured=peak,
                hint=Hint(
                    "call scheduler.step() after every optimizer.step()"
                    + (
                        f"; and the factor never exceeds {max(by_step) / base:.1e} even so: a Noam formula is the rate "
                        "itself, the optimizer's own must be 1"
                        if base < 0.1 and max(by_step) < STARVED * base
                        else f"; the rate then reaches {max(by_step):.1e}"
                    ),
                    "lr.schedule_per_epoch",
                    "lr.too_small",
                ),
            )
        longer, own = run.again(4 * run.total, calls + 1, "step"), run.again(run.total, calls + 1, "step")
        if any(not math.isclose(a, b, rel_tol=run.unit) for a, b in zip(longer, own)):
            ctx.fail(
                f"the schedule is stepped once per epoch while its formula counts optimizer steps: it was built for "
                f"{run.total} steps and is stepped {calls} times",
                where=f"the rate goes from {curve[0]:.4g} to {curve[-1]:.4g}",
                hint=Hint(
                    "step it after every optimizer.step(), or build it from the number of epochs",
                    "lr.schedule_per_epoch",
                ),
            )
    elif base < 0.1 and peak < STARVED * base and steps == run.total:
        ctx.fail(
            f"the schedule's factor never exceeds {peak / base:.1e}: the effective rate stays below {peak:.1e} while "
            f"the optimizer's own is {base:.1e}",
            measured=peak,
            allowed=None,
            where=f"{steps} optimizer steps",
            hint=Hint(
                "LambdaLR multiplies: a function that returns a rate (Noam's is one) wants an optimizer with lr=1",
                "lr.too_small",
            ),
        )
