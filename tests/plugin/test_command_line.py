"""pytest --lm SPEC: items, ids, selection, outcomes, ledger, and silence without --lm."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CHEAP = ("--lm-select", "contract.shape", "--lm-select", "contract.finite")


def test_adds_one_item_a_check_named_subject_dash_check(project: pytest.Pytester) -> None:
    result = project.runpytest("--lm", "own_models:Sound", *CHEAP, "-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["lm::Sound-contract.shape PASSED*", "lm::Sound-contract.finite PASSED*"])
    result.stdout.fnmatch_lines(["*Sound conforms: 2 passed*"])


def test_runs_named_files_beside_the_subjects(project: pytest.Pytester) -> None:
    project.runpytest("--lm", "own_models:Sound", *CHEAP, "test_other.py").assert_outcomes(passed=3)


def test_finding_shows_the_figures_and_the_reproduction(project: pytest.Pytester) -> None:
    result = project.runpytest("--lm", "own_models:Broken", *CHEAP)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*contract.finite: * logits are NaN or infinite*",
            "*lmconform check own_models:Broken --select contract.finite*",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [(("-k", "finite"), 1), (("-m", "smoke"), 2), (("-m", "thorough"), 0), (("--lm-deselect", "contract.finite"), 1)],
    ids=["keyword", "marker", "marker-none", "deselect"],
)
def test_narrows(project: pytest.Pytester, arguments: tuple[str, ...], passed: int) -> None:
    outcomes = project.runpytest("--lm", "own_models:Sound", *CHEAP, *arguments).parseoutcomes()
    assert outcomes.get("passed", 0) == passed


def test_last_failed_runs_the_finding_alone(project: pytest.Pytester) -> None:
    project.runpytest("--lm", "own_models:Broken", *CHEAP)
    project.runpytest("--lm", "own_models:Broken", *CHEAP, "--lf").assert_outcomes(failed=1)


def test_junit_holds_the_figures(project: pytest.Pytester) -> None:
    project.runpytest("--lm", "own_models:Broken", *CHEAP, "--junitxml", "out.xml")
    text = (project.path / "out.xml").read_text()
    assert 'name="lmconform_id" value="contract.finite"' in text
    assert 'name="lmconform_status" value="failed"' in text


def test_json_report_is_written(project: pytest.Pytester) -> None:
    project.runpytest("--lm", "own_models:Broken", *CHEAP, "--lm-json", "out.json")
    report = json.loads((project.path / "out.json").read_text())
    assert report["ok"] is False
    assert report["counts"]["failed"] == 1


def test_subject_that_cannot_be_built_fails_once(project: pytest.Pytester) -> None:
    result = project.runpytest("--lm", "own_models:fails", *CHEAP)
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*could not be built: *no weights here*"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--lm", "own_models:Soun"), "*did you mean Sound?*"),
        (("--lm", "nowhere.own_models:Sound"), "*there is no module nowhere*"),
        (("--lm", "own_models:Sound", "--lm-select", "contract.shap"), "*did you mean contract.shape*"),
        (("--lm", "own_models:Sound", "--lm-expected", "none.toml"), "*none.toml: no such expected-failure file*"),
        (("--lm", "own_models:Sound", "--lm-device", "tpu"), "device 'tpu': *lmconform adds sim and sim:2"),
    ],
    ids=["attribute", "module", "check", "expected-file", "device"],
)
def test_bad_usage_is_one_clear_error(project: pytest.Pytester, arguments: tuple[str, ...], says: str) -> None:
    result = project.runpytest(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: lmconform: {says}"])


def test_nothing_executed_is_an_error(project: pytest.Pytester) -> None:
    result = project.runpytest("--lm", "own_models:Sound", "--lm-select", "padding.left")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*Sound nothing was checked: 1 not_applicable*"])


def test_expected_failures_xfail_and_stale_ones_fail(project: pytest.Pytester) -> None:
    project.path.joinpath("expected.toml").write_text(
        '[[expected]]\nsubject = "Broken"\nid = "contract.finite"\nreason = "divides by 0 beyond 30 tokens"\n'
        '[[expected]]\nsubject = "Broken"\nid = "contract.shape"\nreason = "was once wrong"\n'
    )
    result = project.runpytest("--lm", "own_models:Broken", *CHEAP, "--lm-expected", "expected.toml", "-rx")
    result.assert_outcomes(xfailed=1, failed=1)
    result.stdout.fnmatch_lines(["*passed, though expected to fail: remove the entry*"])
    result.stdout.fnmatch_lines(["*divides by 0 beyond 30 tokens*"])


def test_options_come_from_the_project_file(project: pytest.Pytester) -> None:
    project.makepyprojecttoml('[tool.lmconform]\nselect = ["contract.shape"]\n')
    project.runpytest("--lm", "own_models:Sound").assert_outcomes(passed=1)


def test_misspelt_option_in_the_project_file_is_an_error(project: pytest.Pytester) -> None:
    project.makepyprojecttoml('[tool.lmconform]\nslect = ["contract.shape"]\n')
    result = project.runpytest("--lm", "own_models:Sound")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*no option 'slect'; did you mean select?*"])


def test_without_lm_nothing_changes_and_next_to_nothing_is_imported(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_other="""
        import sys

        def test_clean():
            assert not {'torch', 'transformers'} & set(sys.modules)
            ours = {name for name in sys.modules if name.startswith('lmconform')}
            assert ours == {'lmconform', 'lmconform.flags', 'lmconform.pytest_plugin'}
        """
    )
    plain = project.runpytest_subprocess("test_other.py")
    plain.assert_outcomes(passed=1)
    plain.stdout.no_fnmatch_line("lmconform*")


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, lmconform, lmconform.pytest_plugin; from lmconform.registry import all_checks; all_checks();"
        "lmconform.parametrize_with_checks(['transformers:llama']);"
        "sys.exit(bool({'torch', 'transformers', 'hypothesis'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_check_blocked_by_one_outside_the_run_fails(project: pytest.Pytester) -> None:
    result = project.runpytest("--lm", "own_models:Broken", "--lm-select", "batching.permutation")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*batching.permutation: blocked by contract.finite: *"])


def test_isolated_subject_that_dies_is_a_finding_and_the_run_goes_on(project: pytest.Pytester) -> None:
    project.makepyfile(
        crashing="""
        import os
        from own_models import Sound

        class Crashing(Sound):
            def forward(self, idx):
                if idx.shape[1] > 30:
                    os.kill(os.getpid(), 11)
                return super().forward(idx)
        """
    )
    result = project.runpytest("--lm", "crashing:Crashing", "--lm", "own_models:Sound", *CHEAP, "--lm-isolate", "-v")
    result.assert_outcomes(passed=2, failed=1, skipped=1)
    result.stdout.fnmatch_lines(
        ["lm::Crashing-contract.shape FAILED*", "*the process died (SIGSEGV) while running contract.shape*"]
    )
    result.stdout.fnmatch_lines(["Sound conforms: 2 passed"])


def test_isolation_refuses_a_live_object_with_the_reason(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import lmconform
        from own_models import Sound

        @lmconform.parametrize_with_checks([Sound()], isolate=True)
        def test_conformance(subject, check):
            check(subject)
        """
    )
    result = project.runpytest()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*isolate wants a SPEC such as 'pkg.mod:attr', not Sound*"])
