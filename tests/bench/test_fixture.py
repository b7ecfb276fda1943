"""The fixture `paired`, in somebody else's project."""

from __future__ import annotations

import pytest

SLEEPERS = """
import time

def test_gate(paired):
    found = paired(lambda: time.sleep(0.004), lambda: time.sleep(0.001), rounds=6)
    assert found.low < 1.1, f"slower: {found}"
"""


def test_a_gate_by_ratio(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SLEEPERS)
    result = pytester.runpytest("-p", "no:cacheprovider", "-p", "no:xdist", "--junitxml=junit.xml")
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines([r".*AssertionError: slower: [234]\.\d\d \[.*\]"])
    assert 'name="lmconform_ratio" value="' in (pytester.path / "junit.xml").read_text()


SENTENCE = "*paired timings mean nothing beside 1 other xdist worker; run these tests with -n 0*"
PAIR = "def test_pair(paired):\n    assert paired(int, int, rounds=6).ratio > 0"


@pytest.mark.parametrize(("workers", "refused"), [(1, False), (2, True)])
def test_refused_beside_other_workers(pytester: pytest.Pytester, workers: int, refused: bool) -> None:
    pytester.makeconftest(f"def pytest_configure(config): config.workerinput = {{'workercount': {workers}}}")
    pytester.makepyfile(PAIR)
    result = pytester.runpytest("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark")
    result.assert_outcomes(errors=int(refused), passed=int(not refused))
    (result.stdout.fnmatch_lines if refused else result.stdout.no_fnmatch_line)(SENTENCE)


@pytest.mark.slow
def test_refused_under_xdist(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(PAIR)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-n", "2")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([SENTENCE])
