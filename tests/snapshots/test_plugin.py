"""pytest --lm SPEC --lm-snapshot DIR: one item a subject, and one for what nobody uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmconform.cli import main
from tests.snapshots.test_command import MODELS

QUICK = ("--lm-select", "contract.shape")


@pytest.fixture
def project(pytester: pytest.Pytester, snapshots: Path) -> pytest.Pytester:
    """A project with tinies.py, and snaps/ with the snapshot of its Tiny."""
    pytester.makepyfile(tinies=MODELS)
    pytester.syspathinsert()
    (pytester.path / "snaps").mkdir()
    for file in snapshots.glob("*.json"):
        (pytester.path / "snaps" / file.name).write_bytes(file.read_bytes())
    return pytester


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taken")
    (folder / "tinies.py").write_text(MODELS)
    made = folder / "tinies-Tiny.lmsnap.json"
    assert main(["snapshot", f"{folder}/tinies.py:Tiny", "-o", str(made)]) == 0
    return folder


def test_same_subject_passes(project: pytest.Pytester) -> None:
    result = project.runpytest("--lm", "tinies:Tiny", "--lm-snapshot", "snaps", *QUICK, "-v")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["lm::Tiny-snapshot PASSED*", "lm::snapshots-used PASSED*"])


def test_changed_subject_fails_with_the_place_and_the_way_to_renew(project: pytest.Pytester) -> None:
    file = project.path / "snaps" / "tinies-Tiny.lmsnap.json"
    file.rename(file.with_name("tinies-Other.lmsnap.json"))
    result = project.runpytest("--lm", "tinies:Other", "--lm-snapshot", "snaps", "-k", "snapshot")
    result.assert_outcomes(passed=1, failed=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["*behaviour: first in the logits*", "*an epsilon*", "If this is meant: *--update"])


def test_subject_without_a_snapshot_fails_and_says_how_to_take_it(project: pytest.Pytester) -> None:
    result = project.runpytest(
        "--lm", "tinies:Tiny", "--lm", "tinies:Other", "--lm-snapshot", "snaps", "-k", "snapshot"
    )
    result.assert_outcomes(passed=2, failed=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["no snapshot yet: lmconform snapshot tinies:Other -o snaps?tinies-Other.lmsnap.json"])


def test_snapshot_of_no_subject_fails(project: pytest.Pytester) -> None:
    result = project.runpytest("--lm", "tinies:Other", "--lm-snapshot", "snaps", "-k", "snapshots-used")
    result.assert_outcomes(failed=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["snaps holds snapshots that no --lm SPEC of this run uses: tinies-Tiny.lmsnap.json;*"])


def test_isolated_subject_is_compared_in_a_process_of_its_own(project: pytest.Pytester) -> None:
    result = project.runpytest("--lm", "tinies:Tiny", "--lm-snapshot", "snaps", "--lm-isolate", "-k", "Tiny-snapshot")
    result.assert_outcomes(passed=1, deselected=result.parseoutcomes()["deselected"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--lm-snapshot", "snaps"), "*--lm-snapshot goes with --lm SPEC*"),
        (("--lm", "tinies:Tiny", "--lm-snapshot", "nowhere"), "*--lm-snapshot nowhere: no such folder*"),
    ],
    ids=["no-subject", "no-folder"],
)
def test_bad_usage_is_one_clear_error(project: pytest.Pytester, arguments: tuple[str, ...], says: str) -> None:
    result = project.runpytest(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([says])
