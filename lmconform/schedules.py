"""Learning-rate schedules as closed forms: the factor by which the rate is multiplied, by optimizer step from 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ClosedForm:
    """A named schedule and its numbers, all counted in optimizer steps; `form(step)` is the factor.

    `start` is the factor at the beginning of the warm-up, `floor` the one at the end of the decay, `width` the model's
    width in the Noam formula. Fractional steps are taken too.
    """

    name: str
    warmup: float = 0
    total: float | None = None
    start: float = 0.0
    floor: float = 0.0
    width: int | None = None

    def __post_init__(self) -> None:
        if self.name not in FORMS:
            raise ValueError(f"schedule {self.name!r} is none of {', '.join(FORMS)}; or give a callable step -> factor")
        if self.name in ("linear", "cosine") and self.total is None:
            raise ValueError(f"the {self.name} schedule needs total_steps")
        if self.name == "noam" and not (self.width and self.warmup):
            raise ValueError("the noam schedule needs width and warmup_steps")

    def __call__(self, step: float) -> float:
        return FORMS[self.name](self, step)

    def stretched(self, factor: float) -> ClosedForm:
        """The same with every length `factor` times as long."""
        return replace(self, warmup=self.warmup * factor, total=None if self.total is None else self.total * factor)

    def describe(self) -> str:
        numbers = [f"warm-up {self.warmup:g}"] if self.warmup else []
        numbers += [f"{self.total:g} steps"] if self.total is not None and self.name in ("linear", "cosine") else []
        numbers += [f"width {self.width}"] if self.width and self.name == "noam" else []
        return f"{self.name} ({', '.join(numbers)})" if numbers else self.name


def _warming(form: ClosedForm, step: float) -> float | None:
    if step >= form.warmup:
        return None
    return form.start + (1 - form.start) * step / form.warmup


def _progress(form: ClosedForm, step: float) -> float:
    assert form.total is not None
    return min(1.0, (step - form.warmup) / max(1, form.total - form.warmup))


def _constant(form: ClosedForm, step: float) -> float:
    return 1.0


def _linear_warmup(form: ClosedForm, step: float) -> float:
    warming = _warming(form, step)
    return 1.0 if warming is None else warming


def _linear(form: ClosedForm, step: float) -> float:
    warming = _warming(form, step)
    return 1 - (1 - form.floor) * _progress(form, step) if warming is None else warming


def _cosine(form: ClosedForm, step: float) -> float:
    warming = _warming(form, step)
    if warming is not None:
        return warming
    return form.floor + (1 - form.floor) * 0.5 * (1 + math.cos(math.pi * _progress(form, step)))


def _inverse_sqrt(form: ClosedForm, step: float) -> float:
    warming = _warming(form, step)
    scale = form.warmup or 10_000
    return 1 / math.sqrt((step + scale - form.warmup) / scale) if warming is None else warming


def _noam(form: ClosedForm, step: float) -> float:
    """Vaswani et al. 2017, section 5.3; it has no step 0, so steps count from 1."""
    assert form.width
    count = step + 1
    return float(form.width**-0.5 * min(count**-0.5, count * form.warmup**-1.5))


FORMS: dict[str, Callable[[ClosedForm, float], float]] = {
    "constant": _constant,
    "linear_warmup": _linear_warmup,
    "constant_with_warmup": _linear_warmup,
    "linear": _linear,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
    "noam": _noam,
}
