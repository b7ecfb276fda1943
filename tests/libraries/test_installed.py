"""docs/other_libraries.md: each subject is built and checked, where its library is installed; what is red is known."""

from __future__ import annotations

import functools
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from fixtures.subjects.styles import NanoGPT
from lmconform import Report, Subject, check_model

PAGE = Path(__file__).parents[2] / "docs" / "other_libraries.md"
BLOCKS = dict(re.findall(r"```python\n# (.+?)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
LIBRARIES = sorted(set(BLOCKS) - {"checkpoint"})
RED: dict[str, dict[str, str]] = {
    "litgpt": {},
    "x-transformers": {
        "contract.bad_input": "ids are cast with x.long(), which cuts fractions off; by design",
        "positions.precision": "finding x-transformers-rotary-half",
        "precision.bfloat16": "finding x-transformers-mask-half",
        "precision.float16": "finding x-transformers-mask-half",
    },
    "transformer-lens >= 4": {
        "placement.moves": "finding transformer-lens-device-index",
    },
    "transformer-lens < 4": {
        "contract.bad_input": "W_E[tokens] takes -1 for the last row; by design",
        "generation.greedy": "finding hooked-transformer-cached-positions",
        "placement.moves": "finding transformer-lens-device-index",
        "config.knobs": "tie_word_embeddings is for T5 alone, as its documentation says",
    },
}


@functools.cache
def built(library: str) -> Any:
    requirement = Requirement(library)
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        pytest.skip(f"{requirement.name} is not installed")
    if not requirement.specifier.contains(installed):
        pytest.skip(f"{requirement.name} {installed} is installed, this is about {requirement}")
    return subject_of(library)


def subject_of(name: str) -> Any:
    found: dict[str, Any] = {}
    exec(compile(BLOCKS[name], f"{PAGE.name}[{name}]", "exec"), found)
    return found["build"]


@functools.cache
def reported(library: str) -> Report:
    return check_model(built(library), deselect=["training", "collapse"])


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_subject_takes_five_lines(library: str) -> None:
    lines = [line for line in BLOCKS[library].splitlines() if line.strip()]
    assert len(lines) <= 5
    assert set(LIBRARIES) == set(RED)


@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_is_red_but_what_is_known(library: str) -> None:
    red = [*reported(library).failed, *reported(library).warned]
    assert {result.id: result.message for result in red}.keys() == RED[library].keys()


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_it_trains(library: str) -> None:
    assert check_model(built(library), select=["training", "collapse"]).failed == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_cache_is_checked(library: str) -> None:
    reported(library)
    statuses = {result.id: result.status for result in reported(library).results}
    expected = "not_applicable" if library == "transformer-lens >= 4" else "passed"  # the native model has no cache
    assert {statuses[check] for check in ("cache.decode", "cache.chunks", "cache.reuse")} == {expected}


@pytest.mark.parametrize("as_loaded", [False, True])
def test_a_plain_checkpoint_is_checked(as_loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": NanoGPT().state_dict()}, tmp_path / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    report = check_model(
        Subject(subject_of("checkpoint")), as_loaded=as_loaded, select=["contract", "init", "persistence"]
    )
    assert report.failed == []
    assert report.counts["passed"] >= 8
