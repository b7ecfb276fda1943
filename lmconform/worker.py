"""The child process of `lmconform.isolation`: builds one subject and runs the checks it is asked for."""

from __future__ import annotations

import faulthandler
import io
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from lmconform.collector import import_frameworks
from lmconform.conventions import first_line
from lmconform.devices import lies_in_memory
from lmconform.expected import ExpectedError
from lmconform.options import OptionError, Options
from lmconform.registry import UnknownCheck, get_check
from lmconform.results import Result, jsonable
from lmconform.runner import PACKAGE
from lmconform.session import Session
from lmconform.specimen import available_memory
from lmconform.subject import BuildError

TINY = 5_000_000  # parameters below which a second thread costs more than it brings
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def main(events: int, trace: int) -> None:
    """Serve until the commands end. Events are written to the file descriptor `events`, crash traces to `trace`."""
    os.set_inheritable(events, False)
    os.set_inheritable(trace, False)
    faulthandler.enable(trace, all_threads=False)
    faulthandler.register(signal.SIGUSR1, trace, all_threads=False)
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # a subject that reads stdin must not eat commands
    sys.argv = ["lmconform"]
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # what was printed before a crash is seen
    _Worker(os.fdopen(events, "w", encoding="utf-8"), commands).serve()
    sys.stdout.flush()
    os._exit(0)  # no interpreter shutdown: it is slow, and a subject's leftovers may crash in it


class _Worker:
    def __init__(self, events: TextIO, commands: TextIO) -> None:
        self._events = events
        self._commands = commands

    def emit(self, event: str, **data: Any) -> None:
        self._events.write(json.dumps({"event": event, **data}) + "\n")
        self._events.flush()

    def serve(self) -> None:
        setup = json.loads(self._commands.readline() or "null")
        if setup is None:
            return
        sys.path += [entry for entry in setup["path"] if entry not in sys.path]
        options = Options(**setup["options"])
        try:
            import_frameworks(setup["spec"])
            import torch

            self.emit("ready")
            limit_memory(options, setup["spec"])
            session = Session(setup["spec"], options, announce=lambda text: self.emit("announce", text=text))
            runner = session.open()
        except BaseException as error:
            self._refuse(error, setup["spec"])
            return
        if sum(p.numel() for p in runner.subject.module.parameters()) < TINY:
            torch.set_num_threads(1)
        for result in setup["known"]:
            runner.remember(Result.from_dict(result))
        runner.started = lambda id: self.emit("started", id=id)
        self.emit(
            "built",
            name=session.name,
            names=session.names,
            dtype=session.dtype,
            checks=[{"id": c.id, "family": c.family, "severity": c.severity} for c in session.checks],
            expectations=[asdict(entry) for entry in session.expectations],
        )
        for line in self._commands:
            command = json.loads(line)
            try:
                if "diagnose" in command:
                    causes = session.causes([Result.from_dict(result) for result in command["diagnose"]])
                    self.emit("causes", causes=[jsonable(asdict(cause)) for cause in causes])
                else:
                    self.emit("result", result=runner.run(get_check(command["run"])).to_dict())
            except BaseException as error:
                self._fail(error)

    def _refuse(self, error: BaseException, spec: str) -> None:
        for kind, type_ in (
            ("build", BuildError), ("option", OptionError), ("unknown", UnknownCheck), ("expected", ExpectedError),
        ):  # fmt: skip
            if isinstance(error, type_):
                self.emit("refused", kind=kind, text=str(error))
                return
        if isinstance(error, MemoryError):
            self.emit("refused", kind="build", text=f"{spec}: ran out of memory while building")
        elif traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE):
            self._fail(error)
        else:
            self.emit(
                "refused", kind="build", text=f"{spec}: building raised {type(error).__name__}: {first_line(error)}"
            )

    def _fail(self, error: BaseException) -> None:
        self.emit(
            "fault",
            text=f"lmconform itself failed: {type(error).__name__}: {first_line(error)}",
            trace="".join(traceback.format_exception(error)),
        )


def limit_memory(options: Options, spec: str) -> None:
    """Cap the address space at what memory there is, so that wanting more raises here instead of waking the OOM killer.

    Only for the CPU (CUDA reserves address space by the terabyte), only on Linux, and not for a hub id, whose files,
    mapped beside the weights made of them, are of unknown size.
    """
    specs = [spec, *([options.reference] if isinstance(options.reference, str) else [])]
    if sys.platform != "linux" or not lies_in_memory(options.device) or any(_is_hub_id(spec) for spec in specs):
        return
    import resource

    import psutil

    mapped = sum(
        file.stat().st_size
        for spec in specs
        if Path(spec).is_dir()
        for file in Path(spec).iterdir()
        if file.suffix in WEIGHTS
    )
    threads = (os.cpu_count() or 1) * (72 << 20)  # a stack and an arena each
    limit = psutil.Process().memory_info().vms + int(0.95 * available_memory()) + mapped + threads + (1 << 29)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _is_hub_id(spec: str) -> bool:
    return ":" not in spec and not Path(spec).is_dir()
