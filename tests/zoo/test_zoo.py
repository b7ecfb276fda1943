"""`lmconform zoo`: one row a type, whatever the type does."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from lmconform.expected import Expectation
from lmconform.report.html import render_zoo
from lmconform.results import Result, Status
from lmconform.zoo import add_arguments, command, main, server
from lmconform.zoo.journal import journal_of, read_earlier
from lmconform.zoo.rows import Course, Row, idle_entries, make_row, red_by_check, totals

CHECKS = "contract.shape,contract.finite"
HOSTILE = """
import os, sys, time
import torch
from fixtures.subjects.plain import plain

class Sick(torch.nn.Module):
    # sound but for one token, which no probe of the calling convention gives it
    def __init__(self, illness):
        super().__init__()
        self.model, self.illness = plain(), illness

    def forward(self, input_ids):
        if input_ids.shape[1] == 1:
            self.illness()
        return self.model(input_ids)

def kill(): print("the last words"); sys.stdout.flush(); os.kill(os.getpid(), 11)
def kill_later(): return Sick(kill)
def hang(): time.sleep(1000)
def hang_later(): return Sick(hang)
def leave(): os._exit(7)
def hoard(): return torch.nn.Linear(40_000, 40_000)
def hoard_later(): return Sick(lambda: torch.zeros(1 << 32))
def spawn():
    import subprocess
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", "left-by-the-zoo"])
    return plain()
"""


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def zoo(*arguments: str) -> int:
    return main(parsed(*arguments))


# -- a real run ----------------------------------------------------------------------------------------------------


def test_subset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "zoo.json"
    page = tmp_path / "zoo.html"
    types = "llama", "mam?a", "gemma3n", "gpt2"
    code = zoo(*types, "--jobs", "2", "--select", CHECKS, "--json", str(file), "--html", str(page))
    shown = capsys.readouterr().out
    assert code == 0, shown
    data = json.loads(file.read_text())
    assert data["schema_version"] == 1
    rows = {row["type"]: row for row in data["rows"]}
    assert sorted(rows) == ["gemma3n", "gpt2", "llama", "mamba"]
    assert rows["gemma3n"]["status"] == "unreached"
    assert "timm" in rows["gemma3n"]["reason"]
    assert [rows[type]["status"] for type in ("gpt2", "llama", "mamba")] == ["green"] * 3
    assert rows["llama"]["counts"] == {"passed": 2}
    assert rows["llama"]["failed"] == []
    assert rows["llama"]["seconds"] > rows["llama"]["build_seconds"] > 0
    assert data["totals"]["reached"] == 3
    assert data["totals"]["checks"] == {"passed": 6}
    assert not journal_of(file).exists()
    assert "reached 3 of 4: 0 red, 0 triaged, 3 green, 1 unreached" in shown
    assert page.read_text() == render_zoo(data)


def test_the_command_never_imports_torch() -> None:
    script = (
        "import argparse, sys; from lmconform.zoo import add_arguments, main\n"
        "parser = argparse.ArgumentParser(); add_arguments(parser)\n"
        f"code = main(parser.parse_args(['llama', '--select', '{CHECKS}']))\n"
        "print('imported:', {'torch', 'transformers'} & set(sys.modules)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "imported: set()" in done.stdout


def test_killing_the_command_leaves_no_process_behind() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lmconform.zoo", "--jobs", "1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    while b"green" not in process.stdout.readline():
        assert process.poll() is None
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.kill()
    process.wait()
    process.stdout.close()
    assert psutil.wait_procs(family, timeout=10)[1] == []


# -- types that misbehave ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """The rows of subjects that die, hang, hoard memory or leave processes behind."""
    file = tmp_path_factory.mktemp("hostile") / "hostile.py"
    file.write_text(HOSTILE)
    names = ["kill", "kill_later", "hang", "hang_later", "leave", "hoard", "hoard_later", "spawn"]
    args = parsed("--jobs", "4", "--timeout", "6", "--memory", "2")
    settings = {**command.DEFAULTS, "select": CHECKS.split(",")}
    with command.Server() as running:
        events = list(running.run_subjects([(name, f"{file}:{name}") for name in names], settings, args))
    return {event["row"]["type"]: Row.from_dict(event["row"]) for event in events if event["event"] == "row"}


def test_every_type_has_its_row(hostile: dict[str, Row]) -> None:
    assert len(hostile) == 8


def test_killed_while_building(hostile: dict[str, Row]) -> None:
    row = hostile["kill"]
    assert (row.status, row.reason) == ("unreached", "its process died of SIGSEGV while building")
    assert row.output == "the last words"


def test_killed_during_a_check(hostile: dict[str, Row]) -> None:
    row = hostile["kill_later"]
    assert row.status == "red"
    assert row.reason.startswith("its process died of SIGSEGV during contract.")
    assert row.failed == [row.reason.split()[-1]]


def test_hanging_while_building(hostile: dict[str, Row]) -> None:
    row = hostile["hang"]
    assert (row.status, row.reason) == ("unreached", "killed after 6 s (--timeout) while building")
    assert 6 <= row.seconds < 12


def test_hanging_check_is_stopped_and_the_others_go_on(hostile: dict[str, Row]) -> None:
    row = hostile["hang_later"]
    assert row.status == "red"
    assert "3 s" in next(iter(row.messages.values())) or "killed after 6 s" in row.reason


def test_ending_its_own_process(hostile: dict[str, Row]) -> None:
    assert hostile["leave"].reason == "its process ended itself with status 7 while building"


def test_too_large_to_build(hostile: dict[str, Row]) -> None:
    row = hostile["hoard"]
    assert row.status == "unreached"
    assert "--memory: 2 GiB" in row.reason


def test_too_large_to_run(hostile: dict[str, Row]) -> None:
    row = hostile["hoard_later"]
    assert row.status == "red"
    assert "--memory: 2 GiB" in row.reason
    assert row.cut_short


def test_what_a_type_started_ends_with_it(hostile: dict[str, Row]) -> None:
    assert hostile["spawn"].status == "green"
    left = [p for p in psutil.process_iter(["cmdline"]) if "left-by-the-zoo" in (p.info["cmdline"] or [])]
    assert left == []


# -- usage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lama"], "did you mean llama"),
        (["zzz*"], "no causal model type of transformers is called 'zzz*'"),
        (["llama", "--select", "contract.shap"], "did you mean contract.shape"),
        (["llama", "--device", "cuda:99"], "cuda:99"),
        (["llama", "--json", "/nowhere/at/all.json"], "cannot write into /nowhere/at"),
        (["llama", "--resume", "there-is-no-such-file.json"], "nothing to resume"),
        (["llama", "--select", "contract", "--deselect", "contract"], "no check is left"),
    ],
)
def test_usage(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo(*arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--jobs", "0"], ["--timeout", "-1"], ["--memory", "much"]])
def test_arguments_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed(*arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


# -- rows without processes ----------------------------------------------------------------------------------------


def result(id: str, status: str, message: str = "", known: str = "") -> dict[str, Any]:
    return {
        "event": "result", "id": id, "status": status, "message": message, "repro": "again", "seconds": 0.1,
        "known": known, "own_error": False,
    }  # fmt: skip


def row_of(*events: dict[str, Any], end: bool = True, **more: Any) -> Row:
    course = Course()
    for event in [{"event": "built", "seconds": 0.5}, *events, *([{"event": "end"}] if end else [])]:
        course.take(event)
    return make_row("llama", course, seconds=1.0, **more)


def test_red_row() -> None:
    row = row_of(result("a.b", "passed"), result("c.d", "failed", "first\nsecond"), result("e.f", "xfailed", "why"))
    assert (row.status, row.failed, row.xfailed) == ("red", ["c.d"], ["e.f"])
    assert row.reason == "c.d: first"
    assert row.messages == {"c.d": "first", "e.f": "why"}
    assert row.counts == {"passed": 1, "failed": 1, "xfailed": 1}


def test_triaged_row() -> None:
    row = row_of(result("a.b", "xfailed", "by design"), result("c.d", "xfailed", "by design"))
    assert (row.status, row.reason, row.failed) == ("triaged", "by design", [])


def test_warnings_leave_a_row_green() -> None:
    row = row_of(result("a.b", "warned", "careful"))
    assert (row.status, row.warned) == ("green", ["a.b"])


def test_nothing_applicable_is_not_green() -> None:
    row = row_of(result("a.b", "not_applicable"), result("c.d", "blocked"))
    assert (row.status, row.reason) == ("unreached", "none of the selected checks applies")


def test_death_between_checks_is_red() -> None:
    row = row_of(result("a.b", "passed"), end=False, death="killed")
    assert (row.status, row.reason, row.failed) == ("red", "killed between checks", [])


def test_red_by_check_and_totals() -> None:
    rows = [
        Row("a", "red", failed=["x.one", "x.two"], seconds=1), Row("b", "red", failed=["x.two"], seconds=2),
        Row("c", "unreached"), Row("d", "green", stale=["x.one"], counts={"passed": 3}),
    ]  # fmt: skip
    assert {id: [row.type for row in found] for id, found in red_by_check(rows).items()} == {
        "x.two": ["a", "b"],
        "x.one": ["a"],
    }
    sums = totals(rows, 5.0, cores=2, jobs=1)
    assert (sums["types"], sums["reached"], sums["red"], sums["stale"]) == (4, 3, 2, 1)


# -- known deviations that no longer show --------------------------------------------------------------------------


def entry(subject: str, id: str = "contract.shape") -> Expectation:
    return Expectation(subject, id, "reason", "link", known=True)


@pytest.mark.parametrize(
    ("subject", "kind"), [("transformers:llama", "exact"), ("transformers:lla*", "glob"), ("transformers:gpt2", "")]
)
def test_known_but_green(subject: str, kind: str) -> None:
    session = SimpleNamespace(
        expectations=[entry(subject)], names=["llama", "transformers:llama"], dtype="float32",
        options=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    passed = Result("contract.shape", "contract", "fault", Status.passed)
    assert server._known_but_green(session, passed) == kind


def test_idle_entries() -> None:
    rows = [Row("llama", "green", not_shown=["a.b"]), Row("llama4", "triaged", xfailed=["c.d"], not_shown=["a.b"])]
    known = [entry("transformers:lla*", "a.b"), entry("transformers:lla*", "c.d"), entry("transformers:lost", "a.b")]
    assert idle_entries(rows, known, ["llama", "llama4"]) == [
        "known deviation a.b of transformers:lla*: showed in no type of this run",
        "known deviation a.b of transformers:lost: transformers has no such type here",
    ]


# -- exit codes and resuming, on a server that is played -----------------------------------------------------------


class PlayedServer:
    """Answers with prepared rows; `stop_after` plays Ctrl-C."""

    rows: dict[str, Row]
    stop_after: int | None
    asked: list[str]
    versions: dict[str, str]
    types = ("alpha", "beta", "gamma")

    def __enter__(self) -> PlayedServer:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, types: list[str], settings: dict[str, Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
        for number, type in enumerate(types):
            if number == self.stop_after:
                raise KeyboardInterrupt
            PlayedServer.asked.append(type)
            yield {"event": "started", "type": type}
            yield {"event": "row", "row": self.rows[type].to_dict()}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[PlayedServer]:
    PlayedServer.rows = {type: Row(type, "green", counts={"passed": 1}) for type in PlayedServer.types}
    PlayedServer.stop_after = None
    PlayedServer.asked = []
    PlayedServer.versions = {"transformers": "5.0", "lmconform": "0.1"}
    monkeypatch.setattr(command, "Server", PlayedServer)
    return PlayedServer


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (Row("beta", "green", counts={"passed": 1}), 0),
        (Row("beta", "triaged", "known", xfailed=["a.b"], counts={"xfailed": 1}), 0),
        (Row("beta", "unreached", "needs timm"), 0),
        (Row("beta", "red", "a.b: wrong", failed=["a.b"], counts={"failed": 1}), 1),
        (Row("beta", "green", stale=["a.b"], counts={"passed": 1}), 1),
        (Row("beta", "red", "lmconform's own error", own_error=True), 3),
    ],
)
def test_exit_code(row: Row, code: int, played: type[PlayedServer]) -> None:
    played.rows["beta"] = row
    assert zoo() == code


def test_nothing_ran(played: type[PlayedServer]) -> None:
    played.rows["beta"] = Row("beta", "unreached", "needs timm")
    assert zoo("beta") == 1


def test_interrupted_and_resumed(
    tmp_path: Path, played: type[PlayedServer], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "zoo.json"
    played.stop_after = 2
    assert zoo("--json", str(file), "--select", "contract", "--seed", "5") == 130
    assert f"go on with: lmconform zoo --resume {file}" in capsys.readouterr().err
    assert not file.exists()
    with journal_of(file).open("a") as journal:
        journal.write('{"row": {"type": "gam')  # killed while writing

    played.stop_after, played.asked = None, []
    assert zoo("--resume", str(file)) == 0
    assert played.asked == ["gamma"]
    assert "2 of 3 rows taken over, same versions and options" in capsys.readouterr().out
    data = json.loads(file.read_text())
    assert [row["type"] for row in data["rows"]] == ["alpha", "beta", "gamma"]
    assert (data["run"]["select"], data["run"]["seed"]) == (["contract"], 5)
    assert not journal_of(file).exists()

    assert zoo("--resume", str(file)) == 0  # a finished run: nothing is left to do
    assert played.asked == ["gamma"]


def test_resuming_keeps_the_types_that_were_asked_for(tmp_path: Path, played: type[PlayedServer]) -> None:
    file = tmp_path / "zoo.json"
    played.stop_after = 1
    zoo("--json", str(file), "alpha", "gamma")
    played.stop_after = None
    assert zoo("--resume", str(file)) == 0
    assert [row["type"] for row in json.loads(file.read_text())["rows"]] == ["alpha", "gamma"]


@pytest.mark.parametrize(
    ("arguments", "versions", "says"),
    [
        (["--profile", "default"], {}, "profile smoke, now default"),
        (["--no-known"], {}, "known True, now False"),
        ([], {"transformers": "6.0"}, "transformers 5.0, now 6.0"),
    ],
)
def test_rows_under_other_terms_are_not_taken_over(
    arguments: list[str],
    versions: dict[str, str],
    says: str,
    tmp_path: Path,
    played: type[PlayedServer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "zoo.json"
    zoo("--json", str(file))
    played.versions, played.asked = {**played.versions, **versions}, []
    assert zoo("--resume", str(file), *arguments) == 0
    assert played.asked == list(played.types)
    shown = capsys.readouterr().out
    assert "none of its 3 rows taken over" in shown
    assert says in shown


def test_a_row_that_was_cut_short_is_run_again(
    tmp_path: Path, played: type[PlayedServer], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "zoo.json"
    played.rows["beta"] = Row("beta", "red", "killed after 1 s (--timeout) between checks", cut_short=True)
    assert zoo("--json", str(file)) == 1
    played.rows["beta"] = Row("beta", "green", counts={"passed": 1})
    played.asked = []
    assert zoo("--resume", str(file), "--timeout", "200") == 0
    assert played.asked == ["beta"]
    assert "run again, because they did not come to their end: beta" in capsys.readouterr().out


def test_resuming_something_else(
    tmp_path: Path, played: type[PlayedServer], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"rows": 3}')
    assert zoo("--resume", str(file)) == 2
    assert "is no report of lmconform zoo" in capsys.readouterr().err


def test_rows_survive_the_journal(tmp_path: Path, played: type[PlayedServer]) -> None:
    played.rows["alpha"] = Row("alpha", "red", "x", failed=["a.b"], messages={"a.b": "ü\n"}, seconds=1.5, repro={})
    played.stop_after = 2
    zoo("--json", str(tmp_path / "z.json"))
    assert read_earlier(tmp_path / "z.json")[1][0] == played.rows["alpha"]


# -- everything ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_whole_zoo(tmp_path: Path) -> None:
    started = time.monotonic()
    code = zoo("--json", str(tmp_path / "zoo.json"))
    data = json.loads((tmp_path / "zoo.json").read_text())
    assert code == 0, [row["reason"] for row in data["rows"] if row["status"] == "red"]
    assert data["totals"]["reached"] >= 170
    assert time.monotonic() - started < 600
