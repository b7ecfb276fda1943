"""Every finding of docs/findings.toml is still there: its reproduction runs alone and its last assert holds."""

from __future__ import annotations

import random
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from lmconform.registry import all_checks

SOURCE = Path(__file__).parents[2] / "docs" / "findings.toml"
FINDINGS: list[dict[str, Any]] = tomllib.loads(SOURCE.read_text(encoding="utf-8"))["finding"]
FIELDS = {
    "id", "title", "types", "kind", "check", "versions", "where", "cause", "consequence", "workaround", "links",
    "reproduction",
}  # fmt: skip


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding["id"])
def test_reproduction(finding: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    requirement = Requirement(finding["versions"])
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        pytest.skip(f"{requirement.name} is not installed")
    if not requirement.specifier.contains(installed, prereleases=True):
        pytest.skip(f"seen in {requirement}, installed is {installed}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    figures: list[str] = []

    def show(*values: object) -> None:
        figures.append(" ".join(map(str, values)))

    script = compile(finding["reproduction"], f"{SOURCE.name}[{finding['id']}]", "exec")
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            exec(script, {"__name__": "__main__", "print": show})
    except AssertionError:
        pytest.fail(
            f"mended in {requirement.name} {installed}: remove or adjust the entry {finding['id']} of {SOURCE.name} "
            "(its versions, and its entries in lmconform/known). The script printed:\n" + "\n".join(figures)
        )
    finally:
        random.setstate(state)
    assert figures, "a reproduction prints the measured figure"


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding["id"])
def test_entry_is_complete(finding: dict[str, Any]) -> None:
    assert set(finding) == FIELDS
    assert finding["kind"] in {"fault", "trap"}
    assert not finding["check"] or finding["check"] in all_checks()
    assert "lmconform" not in finding["reproduction"]
    assert finding["reproduction"].rstrip().splitlines()[-1].startswith("assert ")
    assert all(link.startswith("https://github.com/") for link in finding["links"])


def test_ids_are_distinct() -> None:
    ids = [finding["id"] for finding in FINDINGS]
    assert len(ids) == len(set(ids))
