"""docs/story.md is what `python docs/replay_story.py --page` makes of the kept figures, and no longer."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.story

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def replay() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "replay_story.py"))


def test_the_page_is_made_of_the_figures(replay: dict[str, Any]) -> None:
    assert replay["page"](replay["_kept"]()) == (DOCS / "story.md").read_text(encoding="utf-8")


def test_every_piece_has_its_section_or_is_part_of_another(replay: dict[str, Any]) -> None:
    assert replay["PIECES"].keys() - replay["SECTIONS"].keys() == {"corpus"}


def test_plots_are_there(replay: dict[str, Any]) -> None:
    page = (DOCS / "story.md").read_text(encoding="utf-8")
    named = [part.partition(")")[0] for part in page.split("](")[1:]]
    assert len(named) == 2
    assert all((DOCS / name).is_file() for name in named)


def test_the_dead_schedule_is_measured_again(replay: dict[str, Any]) -> None:
    """The one piece that takes no data: the kept figures are of this code."""
    kept = replay["_kept"]()["schedule"]
    found = replay["schedule"]()
    assert {name: kept[name] for name in found} == pytest.approx(found)
