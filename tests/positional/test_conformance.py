"""Every encoding on every base against the suite itself."""

from __future__ import annotations

import pytest

from fixtures.subjects import positional
from lmconform import Report, check_model

RED = ("failed", "error", "warned", "not_run", "blocked", "xfailed", "xpassed")


def green(report: Report) -> None:
    found = [f"{result.id}: {result.message}" for result in report.results if result.status in RED]
    assert report.ok, "\n".join(found)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", positional.NAMES)
def test_smoke(name: str, device: str) -> None:
    green(check_model(f"fixtures/subjects/positional.py:{name}", profile="smoke", device=device, isolate=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", positional.NAMES)
def test_default_with_training(name: str, device: str) -> None:
    spec = f"fixtures/subjects/positional.py:{name}"
    green(check_model(spec, profile="default", device=device, isolate=False))
