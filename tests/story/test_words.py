"""Word and character tokenizers made from texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from models.training.errors import UsageError
from models.training.words import characters, normal_form, word_level

pytestmark = pytest.mark.story

TEXTS = ["The cat sat down, and the dog didn't.", '"Yes!" said Tom; it\'s a well-known cat: 3 cats?', "naïve Café"]


def test_specials_stand_first() -> None:
    made = word_level(TEXTS, 100)
    assert made.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<unk>", "<bos>", "<eos>"]
    assert (made.pad_token_id, made.unk_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2, 3)
    assert made("the cat")["input_ids"][0] == 2
    assert 3 not in made("the cat")["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_words_come_back_in_their_normal_form(text: str) -> None:
    made = word_level(TEXTS, 100)
    ids = made(text, add_special_tokens=False)["input_ids"]
    assert made.decode(ids) == normal_form(text)
    assert made(made.decode(ids), add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize("text", ["J\u030c", "\u0130stanbul", "H\u0331", "Caf\u00e9", "Cafe\u0301"])
def test_lower_case_letters_that_compose_are_one_token_wherever_they_come_from(text: str) -> None:
    """J with a caron is two characters, j with a caron one."""
    made = word_level([text], 50)
    ids = made(text, add_special_tokens=False)["input_ids"]
    assert made.unk_token_id not in ids
    assert made(made.decode(ids), add_special_tokens=False)["input_ids"] == ids


def test_the_normal_form() -> None:
    assert normal_form('"Yes!" said Tom; it\u2019s a WELL-known  cat_:\n3 cats?') == (
        "yes! said tom; it's a well-known cat: 3 cats?"
    )


def test_do_not_stays_apart() -> None:
    """What the library's own clean-up of word pieces turns into "don't"."""
    assert normal_form("I do not know") == "i do not know"


def test_the_most_frequent_words_are_kept_whatever_the_order_of_the_texts() -> None:
    texts = ["b b b a a c c", "d a"]
    made = word_level(texts, 4 + 3)
    assert set(made.get_vocab()) - set(made.all_special_tokens) == {"a", "b", "c"}
    assert word_level(texts[::-1], 7).get_vocab() == made.get_vocab()
    assert made("a d", add_special_tokens=False)["input_ids"][1] == made.unk_token_id


def test_case_and_marks_can_be_kept() -> None:
    made = word_level(['Say "Yes" (now)'], 50, lowercase=False, marks='"()')
    assert {"Say", "Yes", '"', "(", ")"} <= made.get_vocab().keys()


def test_no_marks_at_all() -> None:
    assert "." not in word_level(["one. two"], 50, marks="").get_vocab()


def test_characters_are_lossless() -> None:
    made = characters(TEXTS, 100)
    for text in TEXTS:
        assert made.decode(made(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("make", [word_level, characters])
def test_saved_and_loaded_it_is_the_same(make, tmp_path: Path) -> None:
    made = make(TEXTS, 60)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = made(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == made.decode(ids)


@pytest.mark.parametrize("make", [word_level, characters])
@pytest.mark.parametrize(("texts", "size", "says"), [(TEXTS, 4, "leaves no room"), ([""], 50, "hold no")])
def test_what_cannot_be_made(make, texts: list[str], size: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make(texts, size)
