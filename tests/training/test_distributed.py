"""Two processes on one CPU: what holds, what a hang, a death or a refusal says, and the command under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fixtures.planting import around
from fixtures.subjects import PlainGPT, plain
from lmconform import Subject
from lmconform.measuring import ranks
from lmconform.registry import get_check
from lmconform.results import Result
from lmconform.runner import Runner

ROOT = Path(__file__).parents[2]
PLAIN = "fixtures/subjects/plain.py:plain"


def run(given: Any, id: str = "distributed.ddp") -> Result:
    from lmconform.subject import as_subject

    return Runner(as_subject(given).open(), shrink=False).run(get_check(id))


@pytest.mark.parametrize(
    ("spec", "id"),
    [(PLAIN, "distributed.ddp"), ("transformers:gpt2", "distributed.fsdp")],  # gpt2: embedding and head are one tensor
)
def test_sound(spec: str, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = run(spec, id)
    assert result.status == "passed", result.message
    assert result.margin is not None
    assert result.margin < 0.5


def test_a_builder_and_a_module_will_do() -> None:
    for given in (Subject(plain), Subject(plain())):
        specimen = given.open()
        content = ranks.recipe_to_build(specimen)
        assert content is not None
        assert content[0] == "subject"
    assert run(Subject(plain())).status == "passed"


def test_a_lambda_is_not_applicable_unless_the_model_can_be_pickled() -> None:
    def planted() -> nn.Module:
        model = plain()
        around(model.norm, lambda forward, x: forward(x))  # a class made on the spot: nothing can be pickled
        return model

    result = run(Subject(planted))
    assert result.status == "not_applicable"
    assert "needs a SPEC, or a builder that can be pickled" in result.message


class DyingSecond(PlainGPT):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_rank() == 1:
            os.kill(os.getpid(), 9)
        return super().forward(*args, **kwargs)


class WaitingFirst(PlainGPT):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_rank() == 0:  # "only the main process logs"
            dist.all_reduce(torch.zeros(1))
        return super().forward(*args, **kwargs)


class RaisingSecond(PlainGPT):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_rank() == 1:
            raise RuntimeError("no tables on this rank")
        return super().forward(*args, **kwargs)


class Sleeping(PlainGPT):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        import time

        import torch.distributed as dist

        if dist.is_initialized():
            time.sleep(1000)
        return super().forward(*args, **kwargs)


def write(tmp_path: Path, name: str) -> str:
    """A SPEC of one of these classes: this file itself is no importable module."""
    from fixtures.subjects import PlainConfig

    file = tmp_path / "subject.py"
    source = Path(__file__).read_text(encoding="utf-8").replace("import pytest\n", "")
    classes = source[source.index("class DyingSecond") : source.index("def write(")]
    header = "import os\nfrom typing import Any\nimport torch\nfrom fixtures.subjects import PlainConfig, PlainGPT\n\n"
    file.write_text(f"{header}{classes}\ndef build() -> Any:\n    return {name}({PlainConfig.__name__}())\n")
    return f"{file}:build"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("DyingSecond", "rank 1 of two was ended by signal 9, while comparing the ranks"),
        ("RaisingSecond", "rank 1 of two raised, while comparing the ranks after DDP's first broadcast: RuntimeError"),
        ("WaitingFirst", "a collective call"),
        ("Sleeping", "two processes did not come to an end within"),
    ],
)
def test_trouble_is_a_finding(name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PATIENCE", 5.0)
    monkeypatch.setattr(ranks, "SECONDS", 25.0 if name == "Sleeping" else 90.0)
    result = run(write(tmp_path, name))
    assert result.status == "failed", result.message
    assert text in result.message


def test_what_cannot_be_built_elsewhere_is_not_applicable(tmp_path: Path) -> None:
    file = tmp_path / "once.py"
    file.write_text(
        "import os\nfrom fixtures.subjects import plain\n\n\ndef build():\n"
        f"    if os.getpid() != {os.getpid()}:\n        raise OSError('the weights are held by another process')\n"
        "    return plain()\n"
    )
    result = run(f"{file}:build")
    assert result.status == "not_applicable"
    assert "the weights are held by another process" in result.message


def test_torchrun(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lmconform", "check", PLAIN,
        "--select", "distributed", "--json", str(report),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert outcome.stdout.count("2 passed") == 1
    found = json.loads(report.read_text())
    assert {result["id"]: result["status"] for result in found["results"]} == {
        "distributed.ddp": "passed",
        "distributed.fsdp": "passed",
    }


# -- the monitor under two processes -----------------------------------------------------------------------------------

TWO = """\
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from fixtures.subjects.plain import PlainConfig, PlainGPT
from lmconform.monitors import ReplicaMonitor

rank, place, fault = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "fault"
dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
torch.manual_seed(rank)
model = PlainGPT(PlainConfig(layers=1))
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
monitor = ReplicaMonitor(every=2, log=f"{place}.jsonl")
for step in range(6):
    ids = torch.randint(3, 60, (2, 8))
    wrapped(ids, labels=ids).loss.backward()
    if fault and step == 2 and rank == 1:
        model.head.weight.data[0, 0] += 1e-6
    for alert in monitor.step(model=model):
        print(rank, alert.step, alert.cause, alert.evidence["tensors"])
    optimizer.step()
    optimizer.zero_grad()
monitor.flush()
dist.barrier()
"""


@pytest.mark.parametrize("fault", [False, True])
def test_replica_monitor(fault: bool, tmp_path: Path) -> None:
    word = "fault" if fault else "sound"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(rank), str(tmp_path / "meeting"), word],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    expected = "{} 4 distributed.replicas_diverge ['head.weight']\n"
    assert printed == ([expected.format(0), expected.format(1)] if fault else ["", ""])
    lines = (tmp_path / "meeting.jsonl").read_text().splitlines()
    assert len(lines) == 4 + fault  # steps 1, 2, 4, 6, by the first process only
