"""The child process: what the parent imports, how it ends, how it is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmconform import check_model
from lmconform.isolation import RESTARTS, Child, how_it_ended
from lmconform.options import OptionError, make_options
from lmconform.registry import get_check
from lmconform.results import Status
from lmconform.subject import BuildError


def child(spec: str, **options: Any) -> Child:
    return Child(spec, make_options({"select": "contract.shape,contract.finite", **options}))


def test_parent_imports_neither_torch_nor_transformers(
    environment: dict[str, str], broken: Callable[[str], str]
) -> None:
    code = (
        "import sys; from lmconform.cli import main\n"
        f"assert main(['check', {broken('sound')!r}, '--select', 'contract.shape']) == 0\n"
        "assert main(['list']) == 0 and main(['explain', 'contract.shape']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_child_runs_checks_one_by_one(broken: Callable[[str], str]) -> None:
    with child(broken("sound")) as subject:
        subject.open()
        assert [check.id for check in subject.checks] == ["contract.shape", "contract.finite"]
        assert (subject.name, subject.dtype) == ("sound", "float32")
        result = subject.run(get_check("contract.shape"))
        assert (result.id, result.status) == ("contract.shape", Status.passed)
        assert subject.report([result]).ok


def test_a_child_that_is_killed_between_checks_is_started_again(broken: Callable[[str], str]) -> None:
    with child(broken("sound")) as subject:
        subject.open()
        assert subject._process is not None
        os.kill(subject._process._popen.pid, signal.SIGKILL)
        first, second = (subject.run(check) for check in subject.checks)
        assert first.status == Status.error
        assert "the process died (SIGKILL" in first.message
        assert second.status == Status.blocked  # shape is not known to hold


def test_after_too_many_deaths_the_rest_is_not_run(
    broken: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmconform.isolation.RESTARTS", 0)
    assert RESTARTS == 3
    with child(broken("crashes_in_forward")) as subject:
        subject.open()
        first, second = (subject.run(check) for check in subject.checks)
    assert first.status == Status.error
    assert second.status == Status.not_run
    assert second.message.startswith("not run: the process was lost 1 times, the last time because")


def test_check_model_isolated(broken: Callable[[str], str]) -> None:
    report = check_model(broken("gives_nan"), select=["contract.shape", "contract.finite"], isolate=True)
    assert [result.status for result in report.results] == ["passed", "failed"]
    with pytest.raises(BuildError, match="SIGSEGV"):
        check_model(broken("crashes"), isolate=True)


@pytest.mark.parametrize("subject", [dict, object()])
def test_a_live_object_is_refused(subject: Any) -> None:
    with pytest.raises(OptionError, match="a live object cannot be handed to another process"):
        check_model(subject, isolate=True)


def test_known_names_for_endings() -> None:
    assert how_it_ended(-signal.SIGABRT) == "died (SIGABRT)"
    assert how_it_ended(3) == "ended itself with exit code 3"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_ends_the_child_and_shows_the_ledger(
    environment: dict[str, str], broken: Callable[[str], str], tmp_path: Path, number: int, code: int
) -> None:
    arguments = ["check", broken("hangs"), "--select", "contract.shape"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lmconform", *arguments],
        env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a run in the background ignores it
    )  # fmt: skip
    until = time.monotonic() + 30
    while not (children := psutil.Process(process.pid).children()) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in err
    assert not any(process.is_running() for process in children)
    if number == signal.SIGINT:
        assert "nothing ran" in out
        assert "interrupted" in err
