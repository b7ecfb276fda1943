"""The smallest failing case of a red check, searched by hypothesis in the check's own space."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lmconform.cases import Case, Choice, Space, Span
from lmconform.context import Context, Unavailable, Violation

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from lmconform.registry import Check
    from lmconform.specimen import Specimen


def smallest(
    check: Check, subject: Specimen, failing: Case, *, seed: int, seconds: float = 5.0, examples: int = 60
) -> Violation | None:
    """A violation at a case no larger than `failing`, the smallest that hypothesis finds; None if it finds none.

    Bounded by `seconds` and `examples`.
    """
    return search(check, subject, seed=seed, seconds=seconds, examples=examples, at_most=failing)


def search(
    check: Check, subject: Specimen, *, seed: int, seconds: float, examples: int, at_most: Case | None = None
) -> Violation | None:
    """Draw cases widely and shrink the first that fails; None if none does."""
    import hypothesis
    from hypothesis import HealthCheck, Phase, settings

    space = check.space
    assert space is not None
    deadline = time.monotonic() + seconds
    found: list[Violation] = []

    def attempt(case: Case) -> None:
        if time.monotonic() > deadline:
            return
        try:
            check.function(subject, Context(check, subject, seed=seed, cases=[case]))
        except Violation as violation:
            violation.case = case
            found.append(violation)
            raise
        except Unavailable:
            return
        except Exception:  # another failure than the one that is being shrunk
            return

    runner = hypothesis.seed(seed)(
        settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            verbosity=hypothesis.Verbosity.quiet,
        )(hypothesis.given(strategy(space, at_most))(attempt))
    )
    try:
        runner()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit) or not found:
            raise
    return min(found, key=lambda violation: _size(violation.case, space)) if found else None


def strategy(space: Space, at_most: Case | None = None) -> SearchStrategy[Case]:
    """The check's space as a hypothesis strategy; smaller numbers and earlier choices are simpler."""
    from hypothesis import strategies as st

    def field(name: str, domain: Span | Choice) -> SearchStrategy[object]:
        if isinstance(domain, Span):
            high = domain.high if at_most is None else max(domain.low, at_most[name])
            return st.integers(domain.low, high)
        values = domain.values
        if at_most is not None:
            values = values[: values.index(at_most[name]) + 1]
        return st.sampled_from(values)

    return st.fixed_dictionaries({name: field(name, domain) for name, domain in space.items()}).map(Case)


def _size(case: Case | None, space: Space) -> tuple[int, ...]:
    assert case is not None
    sizes = [
        case[name] if isinstance(domain, Span) else domain.values.index(case[name]) for name, domain in space.items()
    ]
    return (sum(sizes), *sizes)
