"""The device matrix of this test tree: what runs where, and that a missing device is said once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

MISSING = "mps" if torch.cuda.is_available() else "cuda"
TESTS = """
import pytest

def test_somewhere(device): assert device

def test_cuda_mps_words(): pass

@pytest.mark.slow_on("sim")
def test_long_there(device): pass

@pytest.mark.parametrize("device", ["sim:2"])
def test_own_choice(device): assert device == "sim:2"
"""


@pytest.fixture
def tree(pytester: pytest.Pytester) -> pytest.Pytester:
    """A test tree with this repository's conftest.py."""
    pytester.makeconftest(Path(__file__).parents[2].joinpath("conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(TESTS)
    return pytester


def test_a_test_runs_on_every_device_there_is(tree: pytest.Pytester) -> None:
    result = tree.runpytest_inprocess("-v")
    result.stdout.fnmatch_lines([f"device matrix: cpu, sim*no {MISSING}*"])
    for id in ("test_somewhere[cpu]", "test_somewhere[sim]", "test_long_there[cpu]", "test_own_choice[sim:2]"):
        result.stdout.fnmatch_lines([f"*::{id.replace('[', '[[]')} PASSED*"])
    result.stdout.no_fnmatch_line("*test_long_there[[]sim[]]*")


@pytest.mark.parametrize(
    ("arguments", "passed"), [(("-k", "sim"), 2), (("--lm-device", "sim"), 3), (("-m", "slow"), 1)]
)
def test_one_device_is_chosen(tree: pytest.Pytester, arguments: tuple[str, ...], passed: int) -> None:
    tree.runpytest_inprocess(*arguments).assert_outcomes(passed=passed, deselected=None)


def test_a_missing_device_is_named_once_when_asked_for_by_word(tree: pytest.Pytester) -> None:
    result = tree.runpytest_inprocess("-k", MISSING)
    result.assert_outcomes(passed=1)
    told = [line for line in result.outlines if line.startswith(f"this machine has no {MISSING}: ")]
    assert len(told) == 1


def test_a_missing_device_that_is_chosen_is_one_error(tree: pytest.Pytester) -> None:
    result = tree.runpytest_inprocess("--lm-device", MISSING)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    told = [line for line in result.errlines if f"device '{MISSING}': this machine has no {MISSING.upper()}" in line]
    assert len(told) == 1
