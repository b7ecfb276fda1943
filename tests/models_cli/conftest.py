"""One trained experiment for all tests that only look at it, and the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures.datasets import competition_problems, word_problems, write
from models.training.cli import main

Run = Callable[..., int]


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library's cache of read files stays in the tests' own folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.delenv("LMCONFORM_DATA", raising=False)
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gsm8k` (with a test split) and `math` (without), made by rule."""
    folder = tmp_path_factory.mktemp("shelf")
    write(folder / "gsm8k", word_problems(40), word_problems(8, seed=1))
    write(folder / "math", competition_problems(20))
    return folder


def options(shelf: Path, out: Path, *more: str) -> list[str]:
    """A run of seconds."""
    return [
        "--datasets", str(shelf / "gsm8k"), "--max-length", "96", "--max-steps", "4", "--batch-size", "4",
        "--vocab-size", "300", "--max-new-tokens", "8", "--eval-samples", "4", "--quiet", "--cpu",
        "--output-dir", str(out), *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def trained(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of eight steps whose heads were controlled; the folder."""
    out = tmp_path_factory.mktemp("experiments")
    code = main(
        [
            "train", "adaptive", *options(shelf, out, "--experiment-name", "first", "--save-steps", "4"),
            "--max-steps", "8", "--control-heads", "--head-warmup", "2", "--head-every", "2",
        ]
    )  # fmt: skip
    assert code == 0
    return out / "first"


@pytest.fixture(scope="session")
def results(trained: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((trained / "results.json").read_text())
    return found
