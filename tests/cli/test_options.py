"""Options: one list, three places, and a clear refusal for each mistake. Nothing here starts a child in vain."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmconform import __version__
from lmconform.cli import main
from lmconform.flags import FLAGS
from lmconform.options import NAMES, make_options, read_ini
from lmconform.registry import all_checks


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a call that exits with 2 before it does anything."""
    assert main(["check", "no_such_module:build", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lmconform: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_every_option_has_a_switch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["check", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for name in [*NAMES, "no-known", "no-isolate", "write-expected", "quiet", "no-color"]:
        assert f"--{name.replace('_', '-')}" in text
    assert "exit codes: 0 something ran" in text


@pytest.mark.parametrize("name", sorted({*FLAGS, *NAMES}))
def test_flags_and_options_agree(name: str) -> None:
    words, annotation = FLAGS[name], str(NAMES[name].type)
    assert (words.get("action") == "append") == annotation.startswith("tuple")
    assert (words.get("action") == "store_true") == (annotation == "bool")
    assert words.get("type", str).__name__ == (annotation.split(" ")[0] if annotation[:3] in ("int", "flo") else "str")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--select", "contract.finit"], "no check is called 'contract.finit'; did you mean contract.finite"),
        (["--deselect", "contracts"], "did you mean contract"),
        (["--timeout", "0"], "timeout must be above 0 seconds"),
        (["--time-budget", "-1"], "time_budget must be above 0 seconds"),
        (["--case", "time=3"], "--case goes with one selected check"),
        (["--select", "contract.shape", "--case", "tim=3"], "case field 'tim' is unknown; this check has batch, time"),
        (["--select", "contract.shape", "--case", "batch=9,time=3"], "9 is outside 1..4"),
        (["--expected", "none.toml"], "none.toml: no such expected-failure file"),
        (["--json", "no/such/folder.json"], "is no folder that can be written to"),
        (["--json", "a.json", "other:spec"], "put {subject} into the name, as in report-{subject}.json"),
    ],
)
def test_bad_options_are_refused_at_once(capsys: pytest.CaptureFixture[str], given: list[str], says: str) -> None:
    assert says in refused(capsys, *given)


@pytest.mark.parametrize("given", [["--profile", "fast"], ["--seed", "x"], ["--selec", "contract"], ["--jsno", "f"]])
def test_argparse_refuses_too(capsys: pytest.CaptureFixture[str], given: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["check", "no_such_module:build", *given])
    assert left.value.code == 2
    assert given[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("profil = 'smoke'", "[tool.lmconform] has no option 'profil'; did you mean profile?"),
        ("seed = 'one'", "seed = 'one' is no int"),
        ("seed = true", "seed = True is no int"),
        ("strict = 1", "strict = 1 is no bool"),
        ("select = [3]", "select = [3] is no string or list of strings"),
        ("select = 'contrct'", "did you mean contract"),
        ("profile = 'fast'", "profile 'fast' is none of smoke, default, thorough"),
        ("seed = ", "pyproject.toml"),
    ],
)
def test_bad_ini_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str, says: str) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[tool.lmconform]\n{table}\n")
    assert says in refused(capsys)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("id = 'contract.finit'\nreason = 'x'", "no check is called 'contract.finit'; did you mean contract.finite"),
        ("id = 'contract.finite'\nreason = ' '", "write the reason; an expected failure without one is refused"),
        ("id = 'contract.finite'", "write the reason"),
        ("id = 'contract.finite'\nreson = 'x'", "unknown key reson"),
        ("reason = 'x'", "id missing"),
    ],
)
def test_bad_expected_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], entry: str, says: str
) -> None:
    (tmp_path / "expected.toml").write_text(f"[[expected]]\nsubject = '*'\n{entry}\n")
    assert says in refused(capsys, "--expected", "expected.toml")


def test_write_expected_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "expected.toml").write_text("mine")
    assert "it exists, and is never overwritten" in refused(capsys, "--write-expected", "expected.toml")
    assert (tmp_path / "expected.toml").read_text() == "mine"


def test_html_without_jinja2_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "the HTML report needs jinja2: pip install 'lmconform[report]'" in refused(capsys, "--html", "a.html")


def test_true_and_false_are_taken_from_ini(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.lmconform]\nstrict = true\nisolate = false\n")
    assert read_ini(tmp_path) == {"strict": True, "isolate": False}


def test_command_line_goes_before_ini(tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: Any) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[tool.lmconform]\nselect = ['contract.shape', 'contract.finite']\nseed = 5\njson = 'ini.json'\n"
    )
    assert main(["check", broken("gives_nan"), "--select", "contract.finite", "--no-color"]) == 1
    out = capsys.readouterr().out
    assert "seed 5," in out
    assert "contract.shape" not in out
    assert (tmp_path / "ini.json").is_file()


def test_nothing_selected_is_no_success(capsys: pytest.CaptureFixture[str], broken: Callable[[str], str]) -> None:
    assert main(["check", broken("sound"), "--select", "contract", "--deselect", "contract"]) == 1
    assert "sound: nothing ran, so nothing is known (no check is selected in this profile)." in capsys.readouterr().out


def test_current_directory_comes_first_from_a_console_script(
    tmp_path: Path, environment: dict[str, str], broken: Callable[[str], str]
) -> None:
    project, scripts = tmp_path / "project", tmp_path / "bin"
    (project / "mine").mkdir(parents=True)
    scripts.mkdir()
    source = Path(broken("sound").partition(":")[0]).read_text()
    (project / "mine" / "model.py").write_text(source)
    script = scripts / "lmconform"
    script.write_text("import sys\nfrom lmconform.cli import main\nsys.exit(main())\n")
    for more in ([], ["--no-isolate"]):
        done = subprocess.run(
            [sys.executable, script, "check", "mine.model:sound", "--select", "contract.shape", *more],
            cwd=project, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "no finding" in done.stdout


def test_version_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert main(["list"]) == 0
    assert main(["list", "--profile", "smoke"]) == 0
    out = capsys.readouterr().out
    assert f"lmconform {__version__}" in out
    lines = out.splitlines()[1:]
    smoke = [check for check in all_checks().values() if check.profile == "smoke"]
    assert len(lines) == len(all_checks()) + len(smoke)
    assert all(check.id in out for check in all_checks().values())


@pytest.mark.parametrize("id", all_checks())
def test_explain_tells_the_whole_check(capsys: pytest.CaptureFixture[str], id: str) -> None:
    check = all_checks()[id]
    assert main(["explain", id]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (id, check.holds, check.doc, f"profile: {check.profile}", *check.needs, *check.requires):
        assert " ".join(part.split()) in text
    assert f"lmconform check SPEC --select {id}" in text


def test_explain_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "contract.shap"]) == 2
    assert "did you mean contract.shape" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error(environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lmconform", "list"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    os.close(os.dup(process.stdout.fileno()))
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() in (0, 120)
    assert b"Traceback" not in err


@pytest.mark.parametrize("given", ["a.b,c", ["a.b", "c"], ["a.b, c"], "a.b c"])
def test_several_in_one_word_are_told_apart(given: str | list[str]) -> None:
    assert make_options({"select": given}).select == ("a.b", "c")
