"""What a check is given beside the subject: cases, random tokens, comparisons that know their bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lmconform import charts, tolerance
from lmconform.cases import Case
from lmconform.specimen import Specimen, Unavailable, random_ids

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmconform.charts import Chart
    from lmconform.registry import Check

__all__ = ["Context", "Hint", "Unavailable", "Violation"]


class Hint(str):
    """The likely cause in a user's words, with the ids of the causes it points at, likeliest first."""

    suspects: tuple[str, ...]

    def __new__(cls, text: str, *suspects: str) -> Hint:
        hint = super().__new__(cls, text)
        hint.suspects = suspects
        return hint


class Violation(Exception):
    """The property does not hold. `measured` and `allowed` are numbers where a bound decided."""

    def __init__(
        self,
        message: str,
        *,
        measured: float | None = None,
        allowed: float | None = None,
        where: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.measured = measured
        self.allowed = allowed
        self.where = where
        self.hint = hint
        self.case: Case | None = None

    @property
    def margin(self) -> float | None:
        return margin(self.measured, self.allowed)


def margin(measured: float | None, allowed: float | None) -> float | None:
    """measured / allowed; infinite where nothing was allowed and something was measured."""
    if measured is None or allowed is None:
        return None
    if allowed == 0:
        return 0.0 if measured == 0 else math.inf
    return measured / allowed


class Context:
    """One run of one check on one subject (in one dtype, on one set of cases)."""

    def __init__(
        self, check: Check, subject: Specimen, *, seed: int = 0, profile: str = "default", cases: Sequence[Case] = ()
    ) -> None:
        self.check = check
        self.subject = subject
        self.seed = seed
        self.profile = profile
        self.notes: list[str] = []
        self.case: Case | None = None
        self.tightest: tuple[float, float, str] | None = None  # measured, allowed, where
        self._charts: dict[str, Chart] = {}
        self._compared: tuple[float, float, tuple[Chart, ...]] | None = None  # the tightest of `equal`
        self._cases = tuple(cases) or check.grid

    # -- inputs ----------------------------------------------------------------------------------------------------

    def cases(self) -> Iterator[Case]:
        """The cases to try: the check's grid, or the one case that is being reproduced or shrunk."""
        for case in self._cases:
            self.case = case
            yield case

    def generator(self, *salt: int) -> torch.Generator:
        """A random generator for this seed; the same salt gives the same numbers."""
        import torch

        mixed = self.seed
        for number in salt:
            mixed = (mixed * 1_000_003 + number + 1) % (1 << 62)
        return torch.Generator().manual_seed(mixed)

    def ids(self, batch: int, time: int, salt: int = 0) -> Tensor:
        """Ordinary (not special) tokens [batch, time], int64, on the subject's device.

        Raises Unavailable where the subject's context is shorter than `time`.
        """
        limit = self.subject.context_length
        if limit is not None and time > limit:
            raise Unavailable(f"needs {time} tokens; the context is {limit}")
        made = random_ids(self.subject.ordinary_ids, batch, time, self.generator(salt, batch, time))
        return made.to(self.subject.device)

    def other_ids(self, ids: Tensor, salt: int = 1) -> Tensor:
        """Ordinary tokens of the same shape that differ from `ids` in every place."""
        import torch

        ordinary = self.subject.ordinary_ids
        step = torch.randint(1, len(ordinary), ids.shape, generator=self.generator(salt, *ids.shape))
        place = {token: index for index, token in enumerate(ordinary)}
        index = torch.tensor([[place[token] for token in row] for row in ids.tolist()])
        return torch.tensor(ordinary)[(index + step) % len(ordinary)].to(ids.device)

    # -- comparisons -----------------------------------------------------------------------------------------------

    def equal(
        self,
        actual: Tensor,
        expected: Tensor,
        message: str,
        *,
        where: str = "",
        hint: str = "",
        noise: float | None = None,
        allowed: float | None = None,
        axes: Sequence[str] = ("row", "position", "token"),
    ) -> None:
        """Both tensors agree within the measured bound, in every place; otherwise Violation, naming the worst place.

        `message` says in words what differs ("logits of a padded row differ from the same row alone"). The bound is
        `allowed` if given, else FACTOR noise floors (`noise`: by default the subject's own).
        """
        if actual.shape != expected.shape:
            raise Violation(
                f"{message}: shapes {list(actual.shape)} and {list(expected.shape)}", where=where, hint=hint
            )
        if actual.numel() == 0:
            return
        bad = actual.isnan() & ~expected.isnan()
        if bool(bad.any()):
            place = _place(bad.nonzero()[0].tolist(), axes)
            raise Violation(f"{message}: NaN at {place}", where=_join(where, place), hint=hint)
        if allowed is None:
            allowed = tolerance.allowed(self.subject.noise if noise is None else noise, expected)
        difference = _apart(actual, expected).nan_to_num_(nan=0.0, posinf=math.inf)  # inf - inf: equal infinities
        worst = int(difference.argmax())
        place = _place(_unravel(worst, difference.shape), axes)
        measured = float(difference.flatten()[worst])
        if self._compared is None or (margin(measured, allowed) or 0) >= (margin(*self._compared[:2]) or 0):
            case = str(self.case or where)
            self._compared = measured, allowed, by_position(difference, axes, allowed=allowed, case=case)
        self.within(measured, allowed, message, where=_join(where, place), hint=hint)

    def differs(self, actual: Tensor, other: Tensor, message: str, *, where: str = "", hint: str = "") -> None:
        """The tensors differ by more than rounding: something that must matter does. Otherwise Violation."""
        floor = tolerance.allowed(self.subject.noise, other)
        change = float(_apart(actual, other).max())
        if change <= floor:
            raise Violation(
                f"{message}: changed the logits by {change:.3g}, rounding alone by up to {floor:.3g}",
                measured=None, where=where, hint=hint,
            )  # fmt: skip

    def within(self, measured: float, allowed: float, message: str, *, where: str = "", hint: str = "") -> None:
        """`measured` is at most `allowed`; otherwise Violation. Green margins are recorded too."""
        ratio = margin(measured, allowed)
        if self.tightest is None or (ratio or 0) > (margin(*self.tightest[:2]) or 0):
            self.tightest = (measured, allowed, where)
        if not measured <= allowed:
            raise Violation(message, measured=measured, allowed=allowed, where=where, hint=hint)

    def fail(
        self, message: str, *, where: str = "", hint: str = "", measured: float | None = None,
        allowed: float | None = None,
    ) -> None:  # fmt: skip
        """Raise Violation: the property does not hold, and no bound was needed to see it."""
        raise Violation(message, measured=measured, allowed=allowed, where=where, hint=hint)

    def not_applicable(self, reason: str) -> None:
        """Leave the check: the property has no meaning for this subject."""
        raise Unavailable(reason)

    def record(self, chart: Chart) -> None:
        """Keep figures for the report's pictures; a later chart of the same title takes the place of the earlier."""
        self._charts[chart.title] = chart

    def charts(self, shown: tuple[float | None, float | None]) -> tuple[Chart, ...]:
        """What was recorded, and the differences by position if `shown` (measured, allowed) is what they came to."""
        compared = self._compared[2] if self._compared is not None and self._compared[:2] == shown else ()
        return (*self._charts.values(), *compared)

    def note(self, text: str) -> None:
        """A remark that goes into the result's message, also on green."""
        if text not in self.notes:
            self.notes.append(text)


def _apart(actual: Tensor, expected: Tensor) -> Tensor:
    """|actual - expected| in float64; in place, for the logits of a large vocabulary outweigh the model."""
    import torch

    return actual.detach().to(torch.float64, copy=True).sub_(expected.detach()).abs_()


def by_position(difference: Tensor, axes: Sequence[str], *, allowed: float, case: str) -> tuple[Chart, ...]:
    """The largest difference at each position, or pair of positions; nothing where `axes` name none, or one place."""
    kept = [index for index, name in enumerate(axes) if "position" in name]
    if len(axes) != difference.dim() or not 1 <= len(kept) <= 2 or min(difference.shape[index] for index in kept) < 2:
        return ()
    rest = [index for index in range(len(axes)) if index not in kept]
    worst = (difference.amax(dim=rest) if rest else difference).tolist()
    if len(kept) == 1:
        lines = {"largest difference": worst}
        return (charts.curves("Error by position", "position", "error", lines, bound=allowed, log="y", case=case),)
    labels = axes[kept[1]], axes[kept[0]]
    return (charts.table("Error by position", *labels, worst, bound=allowed, case=case),)


def _unravel(index: int, shape: Sequence[int]) -> list[int]:
    place: list[int] = []
    for size in reversed(shape):
        index, here = divmod(index, size)
        place.append(here)
    return place[::-1]


def _place(index: Sequence[int], axes: Sequence[str]) -> str:
    names: Sequence[Any] = axes if len(axes) == len(index) else [f"axis {i}" for i in range(len(index))]
    return ", ".join(f"{name} {i}" for name, i in zip(names, index, strict=True))


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
