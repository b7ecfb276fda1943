"""The process that has torch and transformers imported and forks one child per type.

Importing the two 189 times would cost more than the checks. Requests come as one JSON line on stdin, events go as
JSON lines to the descriptor that was stdout. When stdin closes, because the command was interrupted or killed, every
child is killed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lmconform.zoo.rows import OUT_OF_MEMORY, Course, make_row, names_one_type

TAIL = 4096  # bytes of a child's output that are kept
TICK = 0.1  # seconds between two looks at the time caps

Send = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """`subjects` are (type, SPEC) pairs; `options` those of lmconform.options; `memory` is in bytes."""

    subjects: list[tuple[str, str]]
    options: dict[str, Any]
    jobs: int
    timeout: float
    memory: int

    @property
    def cap(self) -> str:
        return f"{self.memory / 2**30:g} GiB"


@dataclass
class Child:
    """A running type: `events` and `output` are the read ends of its pipes."""

    type: str
    pid: int
    events: int
    output: int
    started: float
    course: Course = field(default_factory=Course)
    line: bytes = b""
    tail: bytes = b""
    silent: bool = False  # it closed its events: it ends any moment
    killed: str = ""


def main() -> None:
    """Serve requests until stdin closes."""
    protocol = os.dup(1)
    os.dup2(2, 1)  # whatever an import prints must not run into the protocol
    send = _sender(protocol)
    _preload()
    from lmconform.session import versions
    from lmconform.shrinking import causal_types

    send({"event": "ready", "types": causal_types(), "versions": versions()})
    requests = os.fdopen(0, "rb", buffering=0, closefd=False)  # unbuffered: the pool watches the descriptor
    while line := requests.readline():
        request = Request(**json.loads(line))
        if fault := _unusable(request):
            send({"event": "refused", "reason": fault})
            continue
        folder = tempfile.mkdtemp(prefix="lmconform-zoo-")
        try:
            if not Pool(request, send, folder).run():
                return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        send({"event": "done"})


def _sender(descriptor: int) -> Send:
    def send(event: dict[str, Any]) -> None:
        data = json.dumps(event).encode() + b"\n"
        while data:
            data = data[os.write(descriptor, data) :]

    return send


def _preload() -> None:
    """Import what every child needs. No backward pass here: autograd's threads do not survive a fork."""
    import torch

    torch.set_num_threads(1)
    import hypothesis  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401  (what every architecture imports: a second)
    from transformers import AutoModelForCausalLM, GenerationMixin  # noqa: F401

    from lmconform import excitation, minimise, session, shrinking  # noqa: F401
    from lmconform.expected import known_deviations

    known_deviations()  # imports the checks
    gc.collect()
    gc.freeze()  # or the children's collector would touch, and so copy, every page


def _unusable(request: Request) -> str:
    """Why no type can run, found in a process of its own, since asking for a device can start its driver."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        from lmconform.devices import Device, DeviceError

        try:
            Device(request.options.get("device", "cpu"))
        except DeviceError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text


class Pool:
    """Runs the request's subjects, so many at once, and sends `started` and `row` events."""

    def __init__(self, request: Request, send: Send, folder: str) -> None:
        self.request = request
        self.send = send
        self.folder = folder
        self.selector = selectors.DefaultSelector()
        self.running: list[Child] = []

    def run(self) -> bool:
        """Whether all have ended, rather than the command that asked for them."""
        self.selector.register(0, selectors.EVENT_READ, None)
        waiting = list(reversed(self.request.subjects))
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.request.jobs:
                    self._start(*waiting.pop())
                ending = any(child.silent for child in self.running)
                for key, _ in self.selector.select(TICK / 50 if ending else TICK):
                    if key.data is None:  # the command sends nothing before the end: it is gone
                        return False
                    self._read(key.data, key.fd)
                for child in list(self.running):
                    self._look_after(child)
            return True
        finally:
            for child in self.running:
                _kill(child.pid)
            self.selector.close()

    def _start(self, type: str, spec: str) -> None:
        events, events_in = os.pipe()
        output, output_in = os.pipe()
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._become_child(type, spec, events_in, output_in)
        os.close(events_in)
        os.close(output_in)
        child = Child(type, pid, events, output, started)
        self.running.append(child)
        for descriptor in (events, output):
            os.set_blocking(descriptor, False)
            self.selector.register(descriptor, selectors.EVENT_READ, child)
        self.send({"event": "started", "type": type})

    def _become_child(self, type: str, spec: str, events: int, output: int) -> None:
        """The forked side; never returns."""
        status = 1
        try:
            os.setpgid(0, 0)
            _die_with_parent()
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            for child in self.running:
                os.close(child.events)
                os.close(child.output)
            self.selector.close()
            tempfile.tempdir = os.path.join(self.folder, type)
            os.mkdir(tempfile.tempdir)
            if _caps_memory(self.request.options.get("device", "cpu")):
                _cap_memory(self.request.memory)
            _check(type, spec, self.request.options, _sender(events))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _read(self, child: Child, descriptor: int) -> None:
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return
        if not data:
            self.selector.unregister(descriptor)
            child.silent = child.silent or descriptor == child.events
        elif descriptor == child.output:
            child.tail = (child.tail + data)[-TAIL:]
        else:
            *lines, child.line = (child.line + data).split(b"\n")
            for line in lines:
                child.course.take(json.loads(line))

    def _look_after(self, child: Child) -> None:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        seconds = time.monotonic() - child.started
        if pid:
            self._finish(child, status, seconds)
        elif not child.killed:
            if seconds > self.request.timeout:
                child.killed = f"killed after {self.request.timeout:g} s (--timeout)"
            elif not _caps_memory(self.request.options.get("device", "cpu")) and _resident(child.pid) > (
                self.request.memory
            ):
                child.killed = f"killed at {self.request.cap} of memory (--memory)"
            if child.killed:
                _kill(child.pid)

    def _finish(self, child: Child, status: int, seconds: float) -> None:
        _kill_group(child.pid)  # processes that it started and left
        for descriptor in (child.events, child.output):
            while descriptor in self.selector.get_map() and _readable(descriptor):
                self._read(child, descriptor)
            if descriptor in self.selector.get_map():
                self.selector.unregister(descriptor)
            os.close(descriptor)
        self.running.remove(child)
        shutil.rmtree(os.path.join(self.folder, child.type), ignore_errors=True)
        row = make_row(
            child.type,
            child.course,
            seconds=seconds,
            death=child.killed or _death(status),
            output=_last_lines(child.tail),
            memory=self.request.cap,
        )
        self.send({"event": "row", "row": row.to_dict()})


def _check(name: str, spec: str, options: dict[str, Any], send: Send) -> None:
    """Build the subject and run its checks, reporting every step."""
    from lmconform.options import Options
    from lmconform.results import Result, Status
    from lmconform.runner import run_all
    from lmconform.session import Session
    from lmconform.subject import BuildError

    started = time.perf_counter()
    try:
        session = Session(spec, Options(**options))
        session.open()
    except (BuildError, MemoryError, SystemExit) as error:
        reason = str(error) or type(error).__name__
        send({"event": "unbuilt", "reason": reason.removeprefix(f"{spec}: ").removeprefix(f"{name}: ")})
        return
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if OUT_OF_MEMORY.search(reason):
            send({"event": "unbuilt", "reason": reason})
            return
        traceback.print_exc()
        send({"event": "crash", "reason": reason})
        return
    send({"event": "built", "seconds": time.perf_counter() - started})
    own_errors: set[str] = set()

    def run(check: Any) -> Result:
        send({"event": "checking", "id": check.id})
        try:
            return session.run(check)
        except Exception as error:  # no subject's exception comes this far
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            if not OUT_OF_MEMORY.search(text):
                own_errors.add(check.id)
                text = f"lmconform's own error: {text}"
            return Result(check.id, check.family, check.severity, Status.error, message=text)

    for result in run_all(run, session.checks):
        known = _known_but_green(session, result) if result.status == Status.passed else ""
        send({"event": "result", **result.to_dict(), "known": known, "own_error": result.id in own_errors})
    send({"event": "end"})


def _known_but_green(session: Any, result: Any) -> str:
    """'exact' or 'glob' where the check passed although a known deviation says otherwise."""
    entries: Iterator[Any] = (
        entry
        for entry in session.expectations
        if entry.known and entry.matches(session.names, result.id, session.options.device, session.dtype)
    )
    kinds = {"exact" if names_one_type(entry) else "glob" for entry in entries}
    return min(kinds, default="")


def _die_with_parent() -> None:
    """Linux: be killed when the server is, whatever killed that."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _caps_memory(device: str) -> bool:
    """Whether the kernel can hold the child to its memory. A CUDA context maps far more addresses than it uses."""
    return sys.platform == "linux" and not device.startswith("cuda")  # a simulated one lies in ordinary memory


def _cap_memory(more: int) -> None:
    """Let this process have so many bytes beyond those it has."""
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _resident(pid: int) -> int:
    import psutil

    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0


def _kill(pid: int) -> None:
    """End a child that has not been waited for, and what it started."""
    _kill_group(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it may have no group yet, or no longer
        os.killpg(pid, signal.SIGKILL)


def _readable(descriptor: int) -> bool:
    import select

    return bool(select.select([descriptor], [], [], 0)[0])


def _death(status: int) -> str:
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"its process died of {name}"
    return f"its process ended itself with status {os.WEXITSTATUS(status)}"


def _last_lines(tail: bytes, count: int = 12) -> str:
    return "\n".join(tail.decode(errors="replace").strip().splitlines()[-count:])


if __name__ == "__main__":
    main()
