"""The whole kill matrix: tens of minutes if measured anew. docs/kills.md is its published form.

LMCONFORM_KILL_ROWS=FILE goes on from the rows that `python docs/measure_kills.py --json FILE` has measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures.faults import all_faults

DOCS = str(Path(__file__).parents[2] / "docs")
FIRST, THREE, BOTH, COST = 0.9, 0.99, 0.8, 1 / 3  # of all planted faults; of pairs; of the time of the checks


@pytest.fixture(scope="module", autouse=True)
def docs() -> Iterator[None]:
    """The scripts of docs/ can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        yield


@pytest.fixture(scope="module")
def rows(docs: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every planted fault, every pair and every sound host, measured."""
    import measure_kills

    file = Path(os.environ.get("LMCONFORM_KILL_ROWS") or tmp_path_factory.mktemp("kills") / "rows.jsonl")
    ids = [*(fault.id for fault in all_faults()), *measure_kills.pairs()]
    measure_kills.measure(ids, file, 0, "default", max(1, (os.cpu_count() or 2) // 2))
    return measure_kills.read(file)


@pytest.fixture(scope="module")
def judged(rows: dict[str, dict[str, Any]]) -> list[Any]:
    import kill_figures

    found = kill_figures.judge(all_faults(), rows)
    assert [fault.id for fault in all_faults() if fault.id not in rows] == []
    return found


@pytest.mark.slow
def test_every_fault_is_seen(judged: list[Any]) -> None:
    assert [one.fault.id for one in judged if not set(one.fault.kills) & set(one.red)] == []


@pytest.mark.slow
def test_the_cause_is_named(judged: list[Any]) -> None:
    import kill_figures

    assert kill_figures.share(judged, 1) >= FIRST
    assert kill_figures.share(judged, 3) >= THREE


@pytest.mark.slow
def test_two_faults_at_once_are_both_named(rows: dict[str, dict[str, Any]]) -> None:
    import kill_figures
    import measure_kills

    told = kill_figures.named_both(measure_kills.pairs(), rows)
    assert len(told) == kill_figures.PAIRS
    assert sum(told.values()) >= BOTH * len(told)


@pytest.mark.slow
def test_sound_hosts_have_no_cause(rows: dict[str, dict[str, Any]]) -> None:
    import kill_figures

    sound = {id: row for id, row in rows.items() if id.startswith("sound.")}
    assert len(sound) == len({fault.host for fault in all_faults()})
    assert {id: list(kill_figures.evidence_of(row).red) for id, row in sound.items()} == {id: [] for id in sound}


@pytest.mark.slow
def test_every_check_is_needed(judged: list[Any]) -> None:
    import kill_page

    assert sorted(set(kill_page.redundant(judged)) - set(kill_page.justified())) == []


@pytest.mark.slow
def test_the_diagnosis_costs_a_third_at_most(judged: list[Any]) -> None:
    import kill_figures

    whole, _ = kill_figures.cost(judged)
    assert whole <= COST


def test_what_a_fault_does_to_the_process_does_not_reach_the_next_one() -> None:
    import measure_kills
    import torch

    row = measure_kills.attempted("contract.default_dtype_left", 0, "smoke", {})
    assert [result["id"] for result in row["results"] if result["status"] == "failed"] == ["contract.mode_kept"]
    assert torch.get_default_dtype() == torch.float32
