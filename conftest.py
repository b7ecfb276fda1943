"""What every test here stands on: no hub, one thread, long runs only when asked for, and the device matrix.

A test that takes `device` and does not parametrise it runs on every device there is: cpu, sim (the simulated
accelerator), and cuda and mps where the machine has one. `--lm-device NAME` narrows that to one; `-k cuda` and `-k sim`
select by id. `@pytest.mark.slow_on("sim")` makes the test a long run there.

Every reference model and every position encoding is a marker, given to the tests whose id names it: `-m rope`.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["pytester"]


def pytest_configure(config: pytest.Config) -> None:
    import torch

    from lmconform.devices import DeviceError, require

    torch.set_num_threads(1)
    try:
        require(config.getoption("lm_device") or "cpu")
    except DeviceError as error:
        raise pytest.UsageError(f"--lm-device: {error}") from error
    for name in REFERENCE_MODELS:
        config.addinivalue_line("markers", f"{name}: about the reference model {name}")
    for name in ENCODINGS:
        config.addinivalue_line("markers", f"{name}: about the position encoding {name}")
    config.addinivalue_line("markers", "slow_on(*devices): minutes, not seconds, on these devices; run with -m slow")


REFERENCE_MODELS = ("adaptive", "story", "positional", "staged", "quantum")
ENCODINGS = ("rope", "sinusoidal", "t5_relative", "diet", "alibi", "math_adaptive")


def devices() -> tuple[list[str], list[str]]:
    """The devices of the matrix, and those that this machine lacks."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ["cpu", "sim", *(name for name in there if there[name])], [name for name in there if not there[name]]


def pytest_report_header(config: pytest.Config) -> str:
    there, missing = devices()
    chosen = config.getoption("lm_device")
    lacks = f" (this machine has no {', no '.join(missing)})" if missing else ""
    return f"device matrix: {chosen or ', '.join(there)}{lacks}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A device that -k asks for and the machine lacks is named once; its tests were never made."""
    asked = set(re.findall(r"\w+", config.option.keyword or ""))
    for name in asked.intersection(devices()[1]):
        terminalreporter.write_line(f"this machine has no {name}: -k {name} found tests by their names alone")


@pytest.hookimpl(trylast=True)  # the device stands last in an id
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.iter_markers("parametrize")
    own = any(
        "device" in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]) for mark in marks
    )
    if "device" not in metafunc.fixturenames or own:
        return
    chosen = metafunc.config.getoption("lm_device")
    slow = {name for mark in metafunc.definition.iter_markers("slow_on") for name in mark.args}
    metafunc.parametrize(
        "device",
        [
            pytest.param(name, marks=[pytest.mark.slow] if name in slow else [])
            for name in ([chosen] if chosen else devices()[0])
        ],
    )


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_itemcollected(item: pytest.Item) -> None:
    for name in ENCODINGS:
        if name in item.nodeid:
            item.add_marker(name)
    rest = item.nodeid.replace("math_adaptive", "")  # an encoding, not the model
    for name in REFERENCE_MODELS:
        if name in rest:
            item.add_marker(name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long runs are left out unless the command line says -m slow or --benchmark-only, or names a test."""
    benchmarks = getattr(config.option, "benchmark_only", False)
    if benchmarks or "slow" in config.option.markexpr or any("::" in str(arg) for arg in config.args):
        return
    left = [item for item in items if item.get_closest_marker("slow")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
