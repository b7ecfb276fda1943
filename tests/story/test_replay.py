"""docs/story.md is what `python docs/replay_story.py --page` makes of the kept figures, and no longer."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.story

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("replay_story")


def test_the_page_is_made_of_the_figures(replay: Any) -> None:
    assert replay.page(replay.recorded()) == (DOCS / "story.md").read_text(encoding="utf-8")


def test_every_piece_has_its_section_or_is_part_of_another(replay: Any) -> None:
    sections = importlib.import_module("replay_story_page").SECTIONS
    assert replay.PIECES.keys() - sections.keys() == {"corpus"}


def test_plots_are_there() -> None:
    page = (DOCS / "story.md").read_text(encoding="utf-8")
    named = [part.partition(")")[0] for part in page.split("](")[1:]]
    assert len(named) == 2
    assert all((DOCS / name).is_file() for name in named)


def test_the_dead_schedule_is_measured_again(replay: Any) -> None:
    """The one piece that takes no data: the kept figures are of this code."""
    kept = replay.recorded()["schedule"]
    found = replay.PIECES["schedule"]()
    assert {name: kept[name] for name in found} == pytest.approx(found)
