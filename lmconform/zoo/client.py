"""The child process that runs the types, seen from the command that asks it to."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any

GIB = 2**30


class ServerError(RuntimeError):
    """The process that imports transformers failed: our own error (exit code 3)."""


class Refused(ValueError):
    """The server cannot run what was asked for: a device that is not there (exit code 2)."""


class Server(contextlib.AbstractContextManager["Server"]):
    """The child process of lmconform.zoo.server, ready once it has imported transformers. Raises ServerError."""

    def __init__(self) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)
        boot = f"import sys; sys.path[:] = {sys.path!r}; from lmconform.zoo.server import main; main()"
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for CUDA must not start its driver
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env=environment, start_new_session=True,  # Ctrl-C is for the command; the server ends when stdin closes
        )  # fmt: skip
        try:
            ready = self._event()
        except BaseException:
            self.__exit__()
            raise
        self.types: list[str] = ready["types"]
        self.versions: dict[str, str] = ready["versions"]

    def __exit__(self, *error: object) -> None:
        """Closing its stdin lets the server kill its children and end; one that does not is killed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def run(self, types: list[str], settings: dict[str, Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
        """`started` and `row` events until every type has its row."""
        return self.run_subjects([(type, f"transformers:{type}") for type in types], settings, args)

    def run_subjects(
        self, subjects: list[tuple[str, str]], settings: dict[str, Any], args: argparse.Namespace
    ) -> Iterator[dict[str, Any]]:
        """The same for (name, SPEC) pairs. Raises Refused, ServerError."""
        assert self._process.stdin is not None
        request = {
            "subjects": subjects,
            "options": {
                **settings,
                "timeout": max(1.0, args.timeout / 2),
            },  # one hanging check leaves time to the others
            "jobs": args.jobs,
            "timeout": args.timeout,
            "memory": int(args.memory * GIB),
        }
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        while (event := self._event())["event"] != "done":
            if event["event"] == "refused":
                raise Refused(event["reason"])
            yield event

    def _event(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            tail = self._errors.read().decode(errors="replace").strip()[-2000:]
            raise ServerError(f"the process that imports transformers ended ({self._process.returncode}):\n{tail}")
        event: dict[str, Any] = json.loads(line)
        return event
