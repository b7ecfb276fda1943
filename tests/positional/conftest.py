"""Every method is a marker too: `pytest -m rope` runs what `pytest -k rope` runs of the tests about it."""

from __future__ import annotations

import re

import pytest

from models.positional import METHODS

ABOUT = re.compile(r"(?<![a-z])(" + "|".join(METHODS) + r")(?![a-z0-9])")


def pytest_configure(config: pytest.Config) -> None:
    for method in METHODS:
        config.addinivalue_line("markers", f"{method}: the position encoding of that name, on any base")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "positional" in item.path.as_posix():
            for method in set(ABOUT.findall(item.nodeid)):
                item.add_marker(method)
