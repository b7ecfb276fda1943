"""`lmconform bench SPEC --against SPEC`, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmconform.cli import main

SUBJECTS = """
import torch
from torch import nn

class Quick(nn.Module):
    def __init__(self, rounds=1):
        super().__init__()
        self.rounds = rounds
        self.embedding = nn.Embedding(500, 64)
        self.head = nn.Linear(64, 500)
    def forward(self, idx):
        x = self.embedding(idx)
        for _ in range(self.rounds):
            logits = self.head(x)
        return logits

class Breaks(Quick):
    def forward(self, idx):
        if torch.is_grad_enabled():
            raise RuntimeError("no gradients here")
        return super().forward(idx)

class Short(Quick):
    block_size = 32
    def forward(self, idx):
        assert idx.shape[1] <= self.block_size
        return super().forward(idx)

def slow():
    return Quick(16)
"""
LIGHT = ["--no-memory", "--repeats", "6"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("subjects") / "subjects_to_time.py"
    made.write_text(SUBJECTS)
    return str(made)


def bench(*arguments: str) -> int:
    return main(["bench", *arguments])


def test_every_cell_that_both_can_do_is_timed(capsys: Any, tmp_path: Path) -> None:
    found = tmp_path / "bench.json"
    spec = "fixtures.subjects.plain:plain"
    code = bench(spec, "--against", "transformers:llama", "--new-tokens", "4", "--json", str(found), *LIGHT)
    assert code == 0
    said = capsys.readouterr().out
    assert "generate: not timed, plain: PlainGPT has no generate()" in said
    data = json.loads(found.read_text())
    assert data["schema_version"] == 1
    assert (data["subject"]["spec"], data["peer"]["spec"]) == (spec, "transformers:llama")
    assert data["subject"]["parameters"] > 10_000
    assert data["machine"]["cores"] >= 1
    assert {"torch", "transformers", "python", "lmconform"} <= set(data["machine"]["versions"])
    timed = {cell["name"]: cell for cell in data["cells"] if not cell["reason"]}
    assert list(timed) == ["forward", "backward", "prefill", "decode"]
    for name, cell in timed.items():
        assert name in said
        assert 0 < cell["low"] <= cell["ratio"] <= cell["high"]
        assert len(cell["seconds"]) == len(cell["peer_seconds"]) == 12


@pytest.mark.parametrize(
    ("subject", "peer", "most", "code"),
    [
        ("slow", "Quick", "1.1", 1),
        ("Quick", "slow", "1.1", 0),
        ("slow", "Quick", "1000", 0),
        ("Quick", "Quick", "2", 0),
    ],
)
def test_the_gate(
    file: str, capsys: Any, tmp_path: Path, subject: str, peer: str, most: str, code: int
) -> None:  # fmt: skip
    data = tmp_path / "bench.json"
    sides = [f"{file}:{subject}", "--against", f"{file}:{peer}"]
    cells = ["--cells", "forward", "--batch", "8", "--clock", "processor"]
    assert bench(*sides, *cells, "--max-ratio", most, "--json", str(data), *LIGHT) == code
    assert json.loads(data.read_text())["ok"] is (code == 0)
    assert (f"slower than {most} times {file}:{peer}: forward (" in capsys.readouterr().out) is (code == 1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--repeats", "5"], "--repeats 5: at least 6"),
        (["--batch", "0"], "--batch 0: at least 1"),
        (["--max-ratio", "0"], "--max-ratio 0: a ratio of times, above 0"),
        (["--cells", "foward"], "--cells foward: out of forward, backward, prefill, decode, generate"),
        (["--device", "sim"], "--device sim: cpu and cuda are timed; a simulated device has no speed"),
        (["--device", "mps"], "--device mps: cpu and cuda are timed"),
        (["--shape", "124m"], "--shape 124m is for transformers:TYPE"),
        (["--json", "/nowhere/bench.json"], "/nowhere/bench.json: /nowhere is no folder that can be written to"),
        (["--cells", "generate,decode"], "nothing was timed: generate: Quick: Quick has no generate(); decode: Quick:"),
    ],
)
def test_wrong_usage_is_refused_in_one_sentence(file: str, capsys: Any, arguments: list[str], text: str) -> None:
    assert bench(f"{file}:Quick", "--against", f"{file}:Quick", *LIGHT[:1], *arguments) == 2
    assert text in capsys.readouterr().err


def test_a_cell_in_which_a_side_raises_is_named(file: str, capsys: Any) -> None:
    assert bench(f"{file}:Quick", "--against", f"{file}:Breaks", "--cells", "forward,backward", *LIGHT) == 0
    assert "backward: not timed, Breaks: RuntimeError: no gradients here" in capsys.readouterr().out


def test_a_subject_that_raises_does_not_pass_the_gate(file: str, capsys: Any) -> None:
    given = (f"{file}:Breaks", "--against", f"{file}:Quick", "--cells", "forward,backward", "--max-ratio", "1000")
    assert bench(*given, *LIGHT) == 1
    assert "backward: not timed, Breaks: RuntimeError: no gradients here" in capsys.readouterr().out


@pytest.mark.parametrize("role", ["subject", "peer"])
def test_a_side_that_cannot_be_had(file: str, capsys: Any, role: str) -> None:
    good, gone = f"{file}:Quick", f"{file}:Quack"
    assert bench(*((gone, "--against", good) if role == "subject" else (good, "--against", gone)), *LIGHT) == 2
    assert "has no attribute 'Quack'; did you mean Quick?" in capsys.readouterr().err


def test_more_tokens_than_a_side_takes(file: str, capsys: Any) -> None:
    assert bench(f"{file}:Quick", "--against", f"{file}:Short", "--new-tokens", "1", *LIGHT) == 2
    assert f"--time 64 and --new-tokens 1 make 65 tokens; {file}:Short takes 32" in capsys.readouterr().err


def test_peak_memory_holds_the_logits(file: str, capsys: Any, tmp_path: Path) -> None:
    """16 x 256 tokens x 500 logits are 7.8 MiB; beside them lie 1 MiB of embeddings, and backward adds as much."""
    data = tmp_path / "bench.json"
    sides = [f"{file}:Quick", "--against", f"{file}:Quick", "--cells", "forward,backward", "--repeats", "6"]
    assert bench(*sides, "--batch", "16", "--time", "256", "--json", str(data)) == 0
    if "no peak memory: peak memory is measured by Linux'" in capsys.readouterr().err:
        pytest.skip("not Linux")
    forward, backward = json.loads(data.read_text())["cells"]
    for side in ("peak_bytes", "peer_peak_bytes"):
        assert 8.5 < forward[side] / 2**20 < 14
        assert 15 < backward[side] / 2**20 < 45
