"""The command, run as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Ran:
    """What one call of the command came to."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def broken() -> Callable[[str], str]:
    """The SPEC of a builder in fixtures/subjects/broken.py."""
    return lambda name: f"{ROOT}/fixtures/subjects/broken.py:{name}"


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def lmconform(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Callable[..., Ran]:
    """`lmconform("check", SPEC, ...)` in a folder of its own, or in `cwd`."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(*arguments: str, cwd: Path = elsewhere) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "lmconform", *arguments],
            cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
