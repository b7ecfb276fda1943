"""Files of stories: where one ends, and quotes that were read as the wrong code page."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.training.data import load_examples
from models.training.stories import mended, stories

pytestmark = pytest.mark.story


@pytest.mark.parametrize(
    "right", ["\u201cHi\u201d", "it\u2019s", "\u2018a\u2019", "one \u2013 two", "one\u2014two", "so\u2026"]
)
def test_misread_punctuation_is_mended(right: str) -> None:
    misread = right.encode().decode("cp1252", errors="ignore")  # the last byte of a closing quote is lost
    assert misread != right
    plain = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2013": "-", "\u2014": "-"})
    assert mended(misread) == right.translate(plain).replace("\u2026", "...")


def test_what_is_right_is_left_alone() -> None:
    assert mended("caf\u00e9, \u201cyes\u201d, \u20ac 3") == "caf\u00e9, \u201cyes\u201d, \u20ac 3"


def test_single_line_breaks_part_stories_and_blank_lines_paragraphs() -> None:
    text = "One  day.\n\nThe end.\nOnce upon a time.\n \nHe  slept.\r\n\r\nShe sang.\n"
    assert stories(text) == ["One day.\nThe end.", "Once upon a time.\nHe slept.\nShe sang."]


def test_marks_of_the_end_part_stories_where_there_are_any() -> None:
    assert stories("One.\nTwo.\n<|endoftext|>\nThree.\n<|endoftext|>") == ["One.\nTwo.", "Three."]


def test_a_file_is_found_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales" / "one.txt").write_text("One.\nTwo.\n")
    monkeypatch.setenv("LMCONFORM_DATA", str(tmp_path))
    assert len(load_examples("tales/one.txt", "train", unit="story")) == 2


def test_a_text_is_a_line_or_a_story(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("One.\n\nTwo.\nThree.\n")
    rows = {unit: load_examples(str(tmp_path / "texts.txt"), "train", unit=unit) for unit in ("line", "story")}
    assert sorted(row.completion for row in rows["line"]) == ["One.", "Three.", "Two."]
    assert sorted(row.completion for row in rows["story"]) == ["One.\nTwo.", "Three."]
