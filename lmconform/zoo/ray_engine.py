"""The zoo on a Ray cluster: one server process a worker, one type at a time each.

A worker that dies is started again by Ray, and the type it was at is run again: no row is lost, none is there twice.
This process imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from lmconform.options import OptionError
from lmconform.zoo.client import Refused, Server, ServerError

ATTEMPTS = 3  # of one type on workers that die under it


class Worker:
    """What runs on a node: the server process, and the type that is asked for."""

    def __init__(self) -> None:
        self.server = Server()

    def ready(self) -> dict[str, Any]:
        """Its types and versions, and its process."""
        return {"types": self.server.types, "versions": self.server.versions, "pid": os.getpid()}

    def run(self, type: str, settings: dict[str, Any], timeout: float, memory: float) -> dict[str, Any]:
        """The row of one type; where the device is not there, {"refused": why}."""
        limits = argparse.Namespace(jobs=1, timeout=timeout, memory=memory)
        try:
            events = list(self.server.run([type], settings, limits))
        except Refused as error:
            return {"refused": str(error)}
        except ServerError as error:  # of no use any more: Ray starts another worker, and asks that one
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        row: dict[str, Any] = events[-1]["row"]
        return row


class RayEngine:
    """`jobs` workers on the cluster at `address`, or on one that is started here and ends with the block.

    Raises OptionError where Ray or the cluster is not there, ServerError where a worker cannot start or its versions
    are others than the rest's.
    """

    def __init__(self, jobs: int, address: str | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise OptionError(f"--engine ray needs Ray: pip install 'lmconform[ray]' ({error})") from error
        self.jobs, self.address, self.ray = jobs, address, ray

    def __enter__(self) -> RayEngine:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        started: dict[str, Any] = {} if self.address else {"num_cpus": self.jobs, "include_dashboard": False}
        try:
            self.ray.init(address=self.address or "local", log_to_driver=False, logging_level=logging.ERROR, **started)
        except ConnectionError as error:
            raise OptionError(f"--ray-address {self.address}: no Ray cluster answers there ({error})") from error
        try:
            self._start()
        except BaseException:
            self.ray.shutdown()
            raise
        return self

    def _start(self) -> None:
        there = int(self.ray.cluster_resources().get("CPU", 0))
        if self.jobs > there:
            raise OptionError(f"--jobs {self.jobs}: the Ray cluster has {there} CPUs, and a worker takes one")
        remote: Any = self.ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=ATTEMPTS)(Worker)
        self.workers: list[Any] = [remote.remote() for _ in range(self.jobs)]
        try:
            answers = self.ray.get([worker.ready.remote() for worker in self.workers])
        except self.ray.exceptions.RayError as error:
            raise ServerError(f"a worker of the Ray cluster could not start: {error}") from error
        self.types: list[str] = answers[0]["types"]
        self.versions: dict[str, str] = answers[0]["versions"]
        others = [answer["versions"] for answer in answers if answer["versions"] != self.versions]
        if others:
            raise ServerError(
                f"the nodes of the Ray cluster have different versions: {self.versions} and {others[0]}; verdicts "
                "depend on them: install the same on every node"
            )
        self.pids: list[int] = [answer["pid"] for answer in answers]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            self.ray.kill(worker)
        self.ray.shutdown()

    def run(self, types: list[str], settings: dict[str, Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
        """`started` and `row` events until every type has its row. Raises Refused, ServerError."""
        waiting, idle = list(reversed(types)), list(self.workers)
        running: dict[Any, tuple[Any, str]] = {}
        while waiting or running:
            while waiting and idle:
                worker, type = idle.pop(), waiting.pop()
                running[worker.run.remote(type, settings, args.timeout, args.memory)] = (worker, type)
                yield {"event": "started", "type": type}
            (done,), _ = self.ray.wait(list(running), num_returns=1)
            worker, type = running.pop(done)
            try:
                row = self.ray.get(done)
            except self.ray.exceptions.RayError as error:
                raise ServerError(
                    f"{type}: its worker of the Ray cluster died {ATTEMPTS + 1} times: {error}"
                ) from error
            if "refused" in row:
                raise Refused(row["refused"])
            idle.append(worker)
            yield {"event": "row", "row": row}
