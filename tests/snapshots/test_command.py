"""lmconform snapshot and compare: what is refused, what is told, and the exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lmconform.cli import main

MODELS = """
import torch
from torch import nn

class Tiny(nn.Module):
    eps = 1e-5
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(31, 16)
        self.norm = nn.LayerNorm(16, eps=self.eps)
        self.head = nn.Linear(16, 31)
    def forward(self, idx):
        return self.head(self.norm(self.embedding(idx)))

class Other(Tiny):
    eps = 1e-6

class Renamed(Tiny):
    def __init__(self):
        super().__init__()
        self.final_norm = self._modules.pop("norm")
    def forward(self, idx):
        return self.head(self.final_norm(self.embedding(idx)))

def fails():
    raise RuntimeError("no weights here")
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The SPEC prefix of tiny_models.py, and the snapshot of its Tiny."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "tiny_models.py").write_text(MODELS)
    file = folder / "tiny.json"
    assert main(["snapshot", f"{folder}/tiny_models.py:Tiny", "-o", str(file)]) == 0
    return f"{folder}/tiny_models.py:", file


def test_same_model_exits_with_0(tiny: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tiny[1]), tiny[0] + "Tiny"]) == 0
    assert "the same: " in capsys.readouterr().out


def test_changed_model_exits_with_1_and_says_what_where_and_how_much(
    tiny: tuple[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    assert main(["compare", str(tiny[1]), tiny[0] + "Other", "--json", str(report)]) == 1
    out = capsys.readouterr().out
    assert "an epsilon" in out
    assert "quiet/logits" in out
    assert f"If this is meant: lmconform snapshot {tiny[0]}Other -o {tiny[1]} --update" in out
    data = json.loads(report.read_text())
    assert data["ok"] is False
    assert data["findings"][0]["kind"] == "behaviour"
    assert data["findings"][0]["size"] > 10 * data["findings"][0]["allowed"]


def test_renaming_counts_unless_inventory_is_ignored(
    tiny: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(tiny[1]), tiny[0] + "Renamed"]) == 1
    assert main(["compare", str(tiny[1]), tiny[0] + "Renamed", "--ignore", "inventory"]) == 0
    assert "inventory (ignored): 2 parameters renamed: norm.weight -> final_norm.weight" in capsys.readouterr().out


def test_existing_file_is_not_overwritten(tiny: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = tiny[1].read_bytes()
    assert main(["snapshot", tiny[0] + "Other", "-o", str(tiny[1])]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert tiny[1].read_bytes() == before


def test_update_shows_what_it_accepts(
    tiny: tuple[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "copy.json"
    file.write_bytes(tiny[1].read_bytes())
    assert main(["snapshot", tiny[0] + "Other", "-o", str(file), "--update"]) == 0
    out = capsys.readouterr().out
    assert "renewed; the differences that this accepts:" in out
    assert "behaviour: first" in out
    assert main(["compare", str(file), tiny[0] + "Other"]) == 0


def test_key_that_the_snapshot_lacks_fails(
    tiny: tuple[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = Path(tiny[0].rpartition("/")[0])
    (folder / "masked.py").write_text(
        "from tiny_models import Tiny\n\nclass Masked(Tiny):\n"
        "    def forward(self, idx, attention_mask=None):\n        return super().forward(idx)\n"
    )
    assert main(["compare", str(tiny[1]), f"{folder}/masked.py:Masked"]) == 1
    assert "padded: the subject can do it now, the snapshot does not hold it" in capsys.readouterr().out


def edited(text: str) -> str:
    return text.replace('"seed": 0', '"seed": 1')


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: "PK\x03\x04", "no snapshot, or a damaged one"),
        (lambda text: text[: len(text) // 2], "no snapshot, or a damaged one"),
        (lambda text: '{"format": "something"}', "no lmconform snapshot"),
        (lambda text: "[1, 2]", "no lmconform snapshot"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "upgrade lmconform"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 0'), "take the snapshot anew"),
        (edited, "edited or damaged"),
    ],
    ids=["binary", "truncated", "other-json", "list", "newer", "older", "edited"],
)
def test_bad_file_is_one_clear_line(
    tiny: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[str], str], says: str
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(damage(tiny[1].read_text()))
    for command in (
        ["compare", str(file), tiny[0] + "Tiny"],
        ["snapshot", tiny[0] + "Tiny", "-o", str(file), "--update"],
    ):
        assert main(command) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert str(file) in errors[0]
        assert says in errors[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compare", "{file}", "{models}fails"], "the builder raised RuntimeError: no weights here"),
        (["compare", "{file}", "{models}Tyny"], "did you mean Tiny"),
        (["compare", "nowhere.json", "{models}Tiny"], "no such snapshot"),
        (["snapshot", "{models}Tiny", "-o", "nowhere/file.json"], "no folder that can be written to"),
        (["snapshot", "{models}fails", "-o", "{file}.new"], "no weights here"),
    ],
    ids=["unbuildable", "misspelt", "no-file", "no-folder", "nothing-to-take"],
)
def test_what_cannot_be_done_exits_with_2(
    tiny: tuple[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main([word.format(file=tiny[1], models=tiny[0]) for word in arguments]) == 2
    assert says in capsys.readouterr().err


def test_folder_gives_the_name_that_pytest_looks_for(tiny: tuple[str, Path], tmp_path: Path) -> None:
    assert main(["snapshot", tiny[0] + "Tiny", "-o", str(tmp_path)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == [
        tiny[0].strip("/").replace("/", "-").replace(":", "-") + "Tiny.lmsnap.json"
    ]
