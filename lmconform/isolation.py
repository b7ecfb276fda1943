"""A subject in a process of its own: whatever it does to that process is a finding, not the end of the run.

The parent imports neither torch nor the subject. It sends commands as JSON lines to the child's stdin and reads
events as JSON lines from a pipe of their own, because the subject may print.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmconform.diagnosis import diagnose
from lmconform.expected import RED, Expectation, ExpectedError, apply
from lmconform.options import OptionError, Options
from lmconform.registry import UnknownCheck
from lmconform.results import Cause, Report, Result, Status
from lmconform.runner import PACKAGE, Named, reproduction, run_all
from lmconform.session import repeated, versions
from lmconform.subject import BuildError

RESTARTS = 3
GRACE = 5.0  # seconds more than the child's own limit: it stops a Python loop by itself, and says so better
STARTUP = 300.0  # seconds to import torch
# Pins the parent's lmconform without changing which other modules the child finds.
START = (
    "import sys; sys.path.insert(1, sys.argv[1]); import lmconform; del sys.path[1]; "
    "from lmconform.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)
REFUSALS: dict[str, type[Exception]] = {
    "build": BuildError,
    "option": OptionError,
    "unknown": UnknownCheck,
    "expected": ExpectedError,
}


@dataclass(frozen=True)
class Outline:
    """What the parent knows of a check."""

    id: str
    family: str
    severity: str


class WorkerFailure(RuntimeError):
    """lmconform's own code failed in the child (exit code 3); `trace` is the traceback."""

    def __init__(self, text: str, trace: str) -> None:
        super().__init__(text)
        self.trace = trace


class _Gone(Exception):
    """The process is no more: `how` it went, in words that follow "the process", and `place` in the subject's code."""

    def __init__(self, how: str, place: str, printed: Sequence[str], *, hung: bool = False) -> None:
        super().__init__(how)
        self.how = how
        self.place = place
        self.printed = list(printed)
        self.hung = hung


class Child:
    """One subject under one set of options, like `lmconform.session.Session`, but in a child process.

    `open` raises BuildError (also when the process dies or hangs while building), or OptionError, UnknownCheck or
    ExpectedError. `run` raises nothing for what the subject does: a check in which the process dies is an `error`, and
    the remaining checks run in a new process.
    """

    def __init__(self, spec: Any, options: Options, announce: Callable[[str], None] | None = None) -> None:
        if not isinstance(spec, str):
            raise OptionError(
                f"isolate wants a SPEC such as 'pkg.mod:attr', not {type(spec).__name__}: "
                "a live object cannot be handed to another process"
            )
        if not (options.reference is None or isinstance(options.reference, str)):
            raise OptionError(
                "isolate wants the reference as a SPEC: a live object cannot be handed to another process"
            )
        if sys.platform == "win32":
            raise OptionError("isolate needs POSIX pipes and signals; say --no-isolate (isolate=False) on Windows")
        self.spec = spec
        self.options = options
        self.name = spec
        self.dtype = options.dtype or "native"
        self.checks: list[Outline] = []
        self.notes: list[str] = []
        self.died = ""
        self.failures: list[str] = []  # tracebacks of our own
        self._announce = announce
        self._names: list[str] = [spec]
        self._expectations: list[Expectation] = []
        self._known: dict[str, Result] = {}
        self._process: _Process | None = None
        self._deaths = 0
        self._ended = ""
        self._printed = 0

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> Child:
        """Build the subject in a new process, unless that is done."""
        if self._process is None:
            self._process = _Process()
            try:
                self._build(self._process)
            except BaseException:
                self._drop()
                raise
        return self

    def _build(self, process: _Process) -> None:
        process.send(
            spec=self.spec,
            options=asdict(self.options),
            path=[entry for entry in sys.path if entry],
            known=[result.to_dict() for result in self._known.values()],
        )
        seconds = self.options.timeout
        try:
            self._await(process, "ready", STARTUP)
            built = self._await(process, "built", seconds)
        except _Gone as gone:
            if gone.hung:
                text = f"building did not end within {seconds:g} s{gone.place}; --timeout gives it longer"
            else:
                text = f"the process {gone.how} while building{gone.place}"
            raise _with_printed(BuildError(f"{self.spec}: {text}"), gone.printed) from None
        self.name, self.dtype, self._names = built["name"], built["dtype"], built["names"]
        self.checks = [Outline(**check) for check in built["checks"]]
        self._expectations = [Expectation(**entry) for entry in built["expectations"]]

    def run(self, check: Named) -> Result:
        """The check's result, expected failures applied."""
        while not self._ended:
            try:
                self.open()
            except BuildError as error:
                self._ended = f"not run: {self.died}, and it could not be built again: {error}"
                break
            assert self._process is not None
            running = [check.id]
            started = time.monotonic()
            try:
                self._process.send(run=check.id)
                event = self._await(self._process, "result", self.options.timeout + GRACE, running)
            except WorkerFailure as failure:
                self.failures.append(failure.trace)
                return Result(check.id, check.family, check.severity, Status.error, message=str(failure))
            except _Gone as gone:
                result = self._death(gone, running[-1], time.monotonic() - started)
                if running[-1] == check.id:
                    return result  # no expected failure covers the loss of the process
                continue  # it was a prerequisite: the new process knows, and says blocked
            result = Result.from_dict(event["result"])
            self._known[result.id] = result
            return self._judge(result)
        return Result(check.id, check.family, check.severity, Status.not_run, message=self._ended)

    def _death(self, gone: _Gone, id: str, seconds: float) -> Result:
        """The process is gone: the result of the check that was running."""
        if gone.hung:
            limit = f"{self.options.timeout:g} s"
            text = f"did not end within {limit} and its process was stopped{gone.place}; --timeout gives it longer"
            story = f"the process was stopped because {id} did not end"
        else:
            text = story = f"the process {gone.how} while running {id}{gone.place}"
            self.died = self.died or story
        lines = [text, *(f"printed last: {line}" for line in gone.printed)]
        outline = next((check for check in self.checks if check.id == id), None)
        repro = reproduction(self.spec, id, self.options.seed, options=repeated(self.options))
        result = Result(
            id, id.partition(".")[0], outline.severity if outline else "fault", Status.error,
            message="\n".join(lines), repro=repro, seconds=seconds,
        )  # fmt: skip
        self._known[id] = result
        self._drop()
        self._deaths += 1
        if self._deaths > RESTARTS:
            self._ended = f"not run: the process was lost {self._deaths} times, the last time because {story}"
        return result

    def _judge(self, result: Result) -> Result:
        return apply(result, self._expectations, self._names, self.options.device, self.dtype)

    def _await(
        self, process: _Process, wanted: str, seconds: float, running: list[str] | None = None
    ) -> dict[str, Any]:
        """The next event of that kind. Raises what the child refuses with, WorkerFailure, or _Gone."""
        deadline = time.monotonic() + seconds
        while True:
            event = process.next(deadline)
            kind = event["event"]
            if kind == wanted:
                return event
            if kind == "started" and running is not None:
                running.append(event["id"])
                deadline = time.monotonic() + seconds
            elif kind == "announce":
                self.notes.append(event["text"])
                if self._announce is not None:
                    self._announce(event["text"])
            elif kind == "refused":
                raise _with_printed(REFUSALS[event["kind"]](event["text"]), process.tail())
            elif kind == "fault":
                raise WorkerFailure(event["text"], event["trace"])

    def report(self, results: list[Result]) -> Report:
        """The Report of these results."""
        printed = self._printed + (self._process.printed if self._process else 0)
        notes = [*self.notes, f"the subject printed {_lines(printed)}"] if printed else self.notes
        return Report(
            subject=self.name,
            profile=self.options.profile,
            device=self.options.device,
            dtype=self.dtype,
            seed=self.options.seed,
            versions=versions(),
            results=results,
            causes=self.causes(results),
            notes=list(dict.fromkeys(notes)),
            strict=self.options.strict,
            died=self.died,
        )

    def causes(self, results: list[Result]) -> list[Cause]:
        """The likeliest causes; without probes where the process is gone, or goes over them."""
        if not any(result.status in RED for result in results):
            return []
        if self._process is not None and not self._ended:
            try:
                self._process.send(diagnose=[result.to_dict() for result in results])
                event = self._await(self._process, "causes", self.options.timeout + GRACE)
                return [Cause(**cause) for cause in event["causes"]]
            except WorkerFailure as failure:
                self.failures.append(failure.trace)
            except _Gone:
                self._drop()
        return diagnose(results, spec=self.spec)

    def _drop(self) -> None:
        if self._process is not None:
            self._process.close()
            self._printed += self._process.printed
            self._process = None

    def close(self) -> None:
        """End the process, and whatever it started."""
        self._drop()


class _Process:
    """One child process and its three streams: commands, events, and what the subject prints."""

    def __init__(self) -> None:
        events, events_end = os.pipe()
        self._trace = tempfile.TemporaryFile()  # noqa: SIM115 - faulthandler writes here, read after a death
        self._popen = subprocess.Popen(
            [sys.executable, "-c", START, str(Path(PACKAGE).parent), str(events_end), str(self._trace.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(events_end, self._trace.fileno()),
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the whole group
        )
        os.close(events_end)
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        self._events, self._output, self._errors = events, self._popen.stdout.fileno(), self._popen.stderr.fileno()
        self._selector = selectors.DefaultSelector()
        self._pending = {fd: b"" for fd in (self._events, self._output, self._errors)}
        for fd in self._pending:
            self._selector.register(fd, selectors.EVENT_READ)
        self._queue: deque[dict[str, Any]] = deque()
        self._last: dict[int, deque[str]] = {fd: deque(maxlen=3) for fd in (self._output, self._errors)}
        self.printed = 0  # lines on stdout

    def send(self, **command: Any) -> None:
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # that it died, and how, is what next() says
            self._popen.stdin.write(json.dumps(command).encode() + b"\n")
            self._popen.stdin.flush()

    def next(self, deadline: float) -> dict[str, Any]:
        """The next event. Raises _Gone when the process has ended, or is stopped at the deadline."""
        while not self._queue:
            left = deadline - time.monotonic()
            if left <= 0:
                place = self._stop()
                raise _Gone("was stopped", place, self.tail(errors=True), hung=True)
            ended = self._popen.poll() is not None
            ready = self._selector.select(0 if ended else min(left, 0.1))
            self._read(ready)
            if ended and not ready and not self._queue:
                raise _Gone(how_it_ended(self._popen.returncode), self._place(), self.tail(errors=True))
        return self._queue.popleft()

    def _read(self, ready: Sequence[tuple[selectors.SelectorKey, int]]) -> None:
        for key, _ in ready:
            data = os.read(key.fd, 1 << 16)
            if not data:
                self._selector.unregister(key.fd)
                continue
            *lines, rest = (self._pending[key.fd] + data).split(b"\n")
            self._pending[key.fd] = rest if key.fd == self._events else rest[-(1 << 16) :]
            if key.fd == self._events:
                self._queue.extend(json.loads(line) for line in lines)
            else:
                self._keep(key.fd, lines)

    def _keep(self, fd: int, lines: Sequence[bytes]) -> None:
        self.printed += len(lines) if fd == self._output else 0
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2].rstrip()
            if text:
                self._last[fd].append(text[:200])

    def tail(self, *, errors: bool = False) -> list[str]:
        """The last few lines that were printed; with stderr, where nothing else says what happened."""
        fds = (self._output, self._errors) if errors else (self._output,)
        for fd in fds:
            if self._pending[fd]:
                self._keep(fd, [self._pending[fd]])
                self._pending[fd] = b""
        return [line for fd in fds for line in self._last[fd]]

    def _stop(self) -> str:
        """End a process that does not answer. Where it was: faulthandler says so even out of C code."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(signal.SIGUSR1)
        until = time.monotonic() + 1.0
        while time.monotonic() < until and not self._place() and self._popen.poll() is None:
            time.sleep(0.02)
        place = self._place()
        self._kill()
        self._read(self._selector.select(0))
        return place

    def _place(self) -> str:
        """' (at model.py:12, in forward)': the innermost frame that is neither ours nor torch's; empty if unknown."""
        text = os.pread(self._trace.fileno(), 1 << 16, 0).decode(errors="replace")
        library = sysconfig.get_paths()["stdlib"] + "/"
        latest = text.rpartition("most recent call first")[2]
        for file, line, function in re.findall(r'File "(.*)", line (\d+) in (.*)', latest):
            in_library = file.startswith(library) and "/site-packages/" not in file
            if not (file.startswith((PACKAGE, "<")) or "/torch/" in file or in_library):
                return f" (at {Path(file).name}:{line}, in {function})"
        return ""

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def close(self) -> None:
        """The end of its commands ends an idle process; a busy one is killed."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()
        if not self._queue:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(0.5)
        self._kill()
        self._read(self._selector.select(0))
        self._selector.close()
        os.close(self._events)
        self._popen.stdout.close()
        self._popen.stderr.close()
        self._trace.close()


def how_it_ended(code: int) -> str:
    """'died (SIGSEGV)' and the like, from a return code as subprocess gives it."""
    if code >= 0:
        return f"ended itself with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if name == "SIGKILL":
        return "died (SIGKILL: killed from outside, most likely because memory ran out)"
    return f"died ({name})"


def check_isolated(subject: Any, options: Options) -> Report:
    """The Report of a subject that is built and checked in a child process. Raises like `Child.open`."""
    with Child(subject, options) as child:
        child.open()
        return child.report(list(run_all(child.run, child.checks, budget=options.time_budget)))


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count} lines"


def _with_printed(error: Exception, printed: Sequence[str]) -> Exception:
    for line in printed:
        error.add_note(f"printed last: {line}")
    return error
