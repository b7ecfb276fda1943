"""docs/replay_quantum.py: conditions differ in what they say they differ in, and held-out text stays unseen."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.reports.quantum import Faults, cross_entropy, labelled
from models.training.balance import BalancedLoss

ROWS = [[2, 7, 8, 3], [2, 9, 3]]


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    return importlib.import_module("replay_quantum")


@pytest.mark.parametrize("faults", [(), ("rolled_labels", "padding_is_eos")], ids=["sound", "polluted"])
def test_our_loss_without_factors_is_the_cross_entropy_of_the_other_conditions(
    replay: Any, faults: tuple[str, ...]
) -> None:
    """Over the same labels, the last of a row among them: rolled, it is the BOS that is in question."""
    labels = labelled(ROWS, Faults.only(*faults), 6)["labels"]
    logits = torch.randn(2, 6, 11)
    torch.testing.assert_close(replay.shifting(BalancedLoss())(logits, labels), cross_entropy(logits, labels))


def test_words_of_held_out_lines_are_not_counted(replay: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tinystories").mkdir()
    lines = ["a cat sat", "", "a dog ran", "zebras zebras zebras", "a cat ran"]
    (tmp_path / "tinystories" / "tiny_stories.txt").write_text("\n".join(lines))
    monkeypatch.setenv("LMCONFORM_DATA", str(tmp_path))
    monkeypatch.setattr(replay, "HELD_OUT_LINES", 2)
    text = replay.read()
    assert set(text.tokenizer.get_vocab()) == {"<pad>", "<unk>", "<bos>", "<eos>", "a", "cat", "sat", "dog", "ran"}
    assert (len(text.train), len(text.held)) == (3, 2)
    assert [2, 1, 1, 1, 3] in text.held
