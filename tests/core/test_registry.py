"""The registry lists checks in one order, whoever imported what first."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

from lmconform import registry
from lmconform.registry import all_checks, register_check

LIST = "from lmconform.registry import all_checks; print(*all_checks())"


@pytest.mark.parametrize("first", ["parity_transfer", "unused_parameters", "training"])
def test_order_does_not_depend_on_what_was_imported_first(first: str) -> None:
    script = f"import lmconform.checks.{first}; {LIST}"
    listed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert listed == list(all_checks())


def test_a_check_may_be_any_callable_and_comes_after_the_families_known_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_checks", dict(registry._checks))
    register_check("house.rule", holds="anything")(functools.partial(lambda limit, subject, ctx: None, 3))
    assert list(all_checks())[-1] == "house.rule"
