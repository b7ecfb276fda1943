"""What importing torch and transformers leaves is kept out of the garbage collector's way, in our processes alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

FROZEN = "import gc, sys; from lmconform.collector import import_frameworks; {}; print(gc.get_freeze_count() > 100_000)"


@pytest.mark.parametrize(
    ("run", "frozen"),
    [
        ("import_frameworks('transformers:llama')", True),
        ("import_frameworks('model.py:build')", True),
        ("import torch; import_frameworks('model.py:build')", False),
        ("import lmconform, torch; lmconform.check_model(torch.nn.Embedding(9, 9), select='contract.shape')", False),
    ],
    ids=["transformers", "torch-alone", "imported-before", "in-somebody-elses-process"],
)
def test_what_is_imported_is_not_walked_again(run: str, frozen: bool) -> None:
    done = subprocess.run([sys.executable, "-c", FROZEN.format(run)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(frozen)


@pytest.mark.parametrize("enabled", [True, False], ids=["on", "off"])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    code = (
        f"import gc; {'' if enabled else 'gc.disable()'}\n"
        "from lmconform.collector import import_frameworks\nimport_frameworks('model.py:build')\nprint(gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(enabled)


def test_subjects_of_a_pytest_run_are_checked_with_the_imports_frozen(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import gc

        def pytest_sessionfinish():
            print("frozen", gc.get_freeze_count() > 100_000)
        """
    )
    result = pytester.runpytest_subprocess("--lm", "transformers:llama", "--lm-select", "contract.shape", "-s")
    result.stdout.fnmatch_lines(["*frozen True*"])
