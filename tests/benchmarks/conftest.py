"""Machine facts in what pytest-benchmark saves; models of 124 M parameters only where they are asked for."""

from __future__ import annotations

from typing import Any

import pytest

from lmconform.bench.machine import facts


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["lmconform"] = facts()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`--benchmark-only` alone runs the tiny models; `-k 124m` or `-m slow` the others too."""
    if "124m" in config.option.keyword or "slow" in config.option.markexpr or any("::" in arg for arg in config.args):
        return
    large = [item for item in items if "124m" in item.nodeid]
    if large:
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if item not in large]
