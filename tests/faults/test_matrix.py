"""The whole kill matrix, measured anew: tens of minutes. docs/kills.md is its published form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fixtures.faults import all_faults

DOCS = Path(__file__).parents[2] / "docs"
FIRST, THREE = 0.9, 0.97  # of all planted faults


@pytest.mark.slow
def test_every_fault_is_seen_and_its_cause_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    import kill_figures
    import kill_page
    import measure_kills

    file = tmp_path / "rows.jsonl"
    faults = all_faults()
    measure_kills.measure([fault.id for fault in faults], file, 0, "default", max(1, (os.cpu_count() or 2) // 2))
    judged = kill_figures.judge(faults, measure_kills.read(file))
    assert len(judged) == len(faults)
    assert [one.fault.id for one in judged if not set(one.fault.kills) & set(one.red)] == []
    assert kill_figures.share(judged, 1) >= FIRST
    assert kill_figures.share(judged, 3) >= THREE
    assert sorted(set(kill_page.redundant(judged)) - set(kill_page.justified())) == []
