"""@lmconform.parametrize_with_checks in somebody's test file."""

from __future__ import annotations

import pytest

import lmconform
from lmconform.options import OptionError

TEST_FILE = """
import lmconform
from own_models import Sound, Broken

@lmconform.parametrize_with_checks([Sound, lmconform.Subject(Broken, name="mine")], select=["contract.finite"])
def test_conformance(subject, check):
    check(subject)
"""


def test_parametrises_over_subjects_and_checks(project: pytest.Pytester) -> None:
    project.makepyfile(test_mine=TEST_FILE)
    result = project.runpytest("-v", "test_mine.py")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*test_conformance[[]Sound-contract.finite[]] PASSED*"])
    result.stdout.fnmatch_lines(["*test_conformance[[]mine-contract.finite[]] FAILED*"])


def test_refuses_a_single_subject() -> None:
    with pytest.raises(TypeError, match=r"wants a list of subjects"):
        lmconform.parametrize_with_checks("transformers:llama")


def test_refuses_a_misspelt_option() -> None:
    with pytest.raises(OptionError, match="did you mean profile"):
        lmconform.parametrize_with_checks([], profil="smoke")
