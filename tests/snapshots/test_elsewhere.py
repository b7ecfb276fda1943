"""Snapshots of other versions and machines: data/plain.lmsnap.json was taken under torch 2.13 and Python 3.11 with MKL,
data/gpt2.lmsnap.json under torch 2.14 and Python 3.14 with OpenBLAS, both on a processor with AVX-512.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmconform.snapshots import store
from lmconform.snapshots.command import told
from lmconform.snapshots.comparison import compare
from lmconform.snapshots.taking import observe
from tests.snapshots.elsewhere import Outcome, slips_of, subject_of

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).parent / "data"
HOSTS = ("plain", "gpt2")


@pytest.mark.parametrize("host", HOSTS)
def test_snapshot_taken_elsewhere_holds_here(host: str) -> None:
    snapshot = store.read(DATA / f"{host}.lmsnap.json")
    found = compare(snapshot, observe(subject_of(host), snapshot))
    assert found.ok, told(found, host)


def test_the_two_were_taken_under_two_releases() -> None:
    torch, python = (
        {store.read(DATA / f"{host}.lmsnap.json").provenance[name].rpartition(".")[0] for host in HOSTS}
        for name in ("torch", "python")
    )
    assert torch == {"2.13", "2.14"}
    assert python == {"3.11", "3.14"}


@pytest.fixture(scope="module")
def with_plain_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Outcome]:
    """Every comparison of both hosts, in a process without vector units and with generic matrix products."""
    environment = {
        "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path_factory.mktemp("home")),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.snapshots.elsewhere", "compare", str(DATA)],
        env=environment, capture_output=True, text=True, check=False, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [Outcome(**json.loads(line)) for line in done.stdout.splitlines()]
    return {(outcome.host, outcome.slip): outcome for outcome in found}


@pytest.mark.parametrize("host", HOSTS)
def test_plain_kernels_change_bits_and_no_verdict(
    with_plain_kernels: dict[tuple[str, str], Outcome], host: str
) -> None:
    outcome = with_plain_kernels[host, ""]
    assert "DEFAULT" in outcome.now
    assert outcome.moved > 0
    assert outcome.ok, outcome


@pytest.mark.parametrize(("host", "slip"), [(host, slip) for host in HOSTS for slip in slips_of(host)])
def test_slip_is_told_with_plain_kernels(
    with_plain_kernels: dict[tuple[str, str], Outcome], host: str, slip: str
) -> None:
    outcome = with_plain_kernels[host, slip]
    assert "behaviour" in outcome.kinds
    assert not outcome.ok
