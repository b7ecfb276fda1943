"""`python -m models compare story`: what stays the same in all arms, the figures, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import random
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.datasets import word_problems, write
from fixtures.subjects.story import stories
from models.story.system import SYSTEM, VARIED, tiny
from models.training import comparison
from models.training.cli import main
from models.training.comparison import (
    Text,
    compare,
    encoded,
    interval,
    score,
    split_texts,
    student_t,
    table,
    within,
)
from models.training.data import Example, PadRight
from models.training.errors import UsageError
from models.training.systems import training_options
from models.training.words import normal_form, word_level

pytestmark = pytest.mark.story

SMALL = ["--max-length", "16", "--batch-size", "2", "--eval-samples", "8", "--vocab-size", "60", "--cpu"]
STEP = 2 * 16  # tokens


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stories") / "stories.txt"
    place.write_text("\n".join([*dict.fromkeys(stories(80))]))
    return place


@pytest.fixture(scope="module")
def found(file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two phases, two seeds, eight steps of the first."""
    figures = tmp_path_factory.mktemp("figures") / "phases.json"
    assert main(["compare", "story", *command(file), "--json", str(figures)]) == 0
    made: dict[str, Any] = json.loads(figures.read_text())
    return made


def command(file: Path, *more: str) -> list[str]:
    return ["--datasets", str(file), *SMALL, "--seeds", "2", "--tokens", str(8 * STEP), *more]


class TestArms:
    def test_start_from_the_same_weights_and_other_ones_for_each_seed(self, found: dict[str, Any]) -> None:
        starts = {name: [run["initial_weights"] for run in arm["runs"]] for name, arm in found["arms"].items()}
        assert starts["1"] == starts["2"]
        assert starts["1"][0] != starts["1"][1]

    def test_read_the_same_number_of_tokens(self, found: dict[str, Any]) -> None:
        steps = {name: arm["runs"][0]["steps"] for name, arm in found["arms"].items()}
        assert steps == {"1": 8, "2": 4}  # the second phase reads two batches a step
        assert found["arms"]["1"]["epochs"] == found["arms"]["2"]["epochs"]

    def test_are_the_two_recipes(self, found: dict[str, Any]) -> None:
        one, two = (found["arms"][name]["options"] for name in "12")
        assert (one["lr_scheduler"], one["label_smoothing"], one["accumulation"]) == ("constant", 0, 1)
        assert (two["lr_scheduler"], two["label_smoothing"], two["accumulation"]) == ("cosine", 0.1, 2)
        assert (two["adam_beta2"], two["weight_decay"]) == (0.98, 0.01)
        assert one["learning_rate"] == two["learning_rate"] == 1e-3

    def test_seconds_machine_and_data_are_told(self, found: dict[str, Any]) -> None:
        assert found["seeds"] == [0, 1]
        assert found["machine"]["threads"] == torch.get_num_threads()
        assert len(found["data"]["train_sha256"]) == 64
        assert found["data"]["validation_texts"] == 8
        assert all(run["seconds"] > 0 and run["written"] for arm in found["arms"].values() for run in arm["runs"])

    def test_differences_are_paired_by_seed(self, found: dict[str, Any]) -> None:
        losses = [[run["loss"] for run in found["arms"][name]["runs"]] for name in "12"]
        assert found["differences"]["2"]["loss"] == interval([two - one for one, two in zip(*losses)])
        assert "1" not in found["differences"]

    def test_the_table_names_every_arm(self, found: dict[str, Any]) -> None:
        shown = table(found)
        assert "differences to 1" in shown
        assert f"{found['arms']['2']['loss']['mean']:.3f}" in shown


@pytest.mark.parametrize("again", [str, str.upper, lambda text: text.replace(" ", "  ")], ids=["same", "case", "space"])
def test_a_text_that_is_held_out_is_not_trained_on(again: Callable[[str], str], file: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.txt"
    twice.write_text(file.read_text() + "\n" + again(file.read_text()))
    train, validation, left_out = split_texts(training_options(SYSTEM, ["--datasets", str(twice), *SMALL]))
    assert left_out >= 6  # most of the eight have their twin among the others
    assert not {normal_form(row.completion) for row in train} & {normal_form(row.completion) for row in validation}


def test_rows_with_a_prompt_are_refused(tmp_path: Path, capsys: Any) -> None:
    place = write(tmp_path / "questions", word_problems(20))
    assert main(["compare", "story", *command(place)]) == 2
    assert "compare takes plain texts, and this row has a prompt" in capsys.readouterr().err


def test_equal_arms_are_equal_runs(file: Path) -> None:
    args = training_options(SYSTEM, ["--datasets", str(file), *SMALL])
    made = compare(SYSTEM, {"a": args, "b": Namespace(**vars(args))}, seeds=2, tokens=STEP, prompt="once")
    assert made["differences"]["b"]["loss"] == {"mean": 0, "low": 0, "high": 0}


@pytest.mark.parametrize(
    ("option", "values"), [("--phase", "12"), ("--width", ("16", "32")), ("--norm-placement", ("pre", "post"))]
)
def test_all_arms_of_a_seed_read_the_same_batches_in_the_same_order(
    option: str, values: Sequence[str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an arm draws for its weights and dropout, and into however many steps it parts the batches."""
    read: list[list[list[list[int]]]] = []

    class Recording(PadRight):
        def __init__(self, pad_token_id: int) -> None:
            super().__init__(pad_token_id)
            read.append([])
            self.batches = read[-1]

        def __call__(self, examples: Any) -> Any:
            self.batches.append([list(example["input_ids"]) for example in examples])
            return super().__call__(examples)

    monkeypatch.setattr(comparison, "PadRight", Recording)
    # two epochs and more, so that the order is drawn again
    given = ["--datasets", str(file), *SMALL, "--train-samples", "16"]
    arms = {value: training_options(SYSTEM, [*given, option, value]) for value in values}
    found = compare(SYSTEM, arms, seeds=2, tokens=24 * STEP, prompt="once")
    assert found["arms"][values[0]]["epochs"] > 2
    # every second is score's, of the validation rows; the loader reads one batch ahead, which is not trained on
    one, other, next_one, next_other = (batches[:24] for batches in read[::2])
    assert len(one) == 24
    assert one == other
    assert next_one == next_other
    assert one != next_one


@pytest.fixture(scope="module")
def lost(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """An arm that learns and one that diverges: what was printed, and the figures."""
    figures = tmp_path_factory.mktemp("lost") / "rates.json"
    shown = io.StringIO()
    rates = ["--vary", "rate", "--values", "1e-3,1e30", "--max-grad-norm", "0", "--json", str(figures)]
    with contextlib.redirect_stdout(shown):
        assert main(["compare", "story", *command(file), *rates]) == 0
    return shown.getvalue(), json.loads(figures.read_text(), parse_constant=pytest.fail)


class TestAnArmThatDiverges:
    def test_leaves_the_others_their_figures(self, lost: tuple[str, dict[str, Any]]) -> None:
        arms = lost[1]["arms"]
        assert math.isfinite(arms["1e-3"]["loss"]["mean"])
        assert set(arms["1e-3"]["runs"][0]["written"]) == {"greedy", "sampled"}

    def test_has_no_mean_and_writes_nothing(self, lost: tuple[str, dict[str, Any]]) -> None:
        arm = lost[1]["arms"]["1e30"]
        assert arm["loss"] == {"mean": "nan", "low": "nan", "high": "nan"}
        assert arm["runs"][0]["written"] == {}

    def test_is_named(self, lost: tuple[str, dict[str, Any]]) -> None:
        assert "1e30 diverged with seed 0, 1" in lost[0]


def test_an_arm_that_cannot_be_built_is_told_before_any_is_trained(
    file: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_run", lambda *_: pytest.fail("an arm was trained"))
    assert main(["compare", "story", *command(file), "--vary", "size", "--values", "32,30"]) == 2
    assert "--width 30: hidden_size 30 is no multiple of 4 heads" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["nowhere/figures.json", "figures.json"])
def test_figures_that_cannot_be_written_are_told_before_any_arm_is_trained(
    place: str, file: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_run", lambda *_: pytest.fail("an arm was trained"))
    (tmp_path / "figures.json").mkdir()
    assert main(["compare", "story", *command(file), "--json", str(tmp_path / place)]) == 2
    assert place in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_explicit_options_win_over_the_recipe(file: Path) -> None:
    args = training_options(SYSTEM, ["--datasets", str(file), "--phase", "2", "--learning-rate", "3e-4"])
    assert (args.learning_rate, args.accumulation) == (3e-4, 2)
    assert training_options(SYSTEM, ["--datasets", str(file), "--accumulation", "1", "--phase=2"]).accumulation == 1


def test_vocabularies_predict_the_same_characters(file: Path, capsys: Any) -> None:
    values = ["--vary", "vocabulary", "--values", "word:20,character:40"]
    without = [word for word in command(file) if word not in ("--vocab-size", "60")]
    assert main(["compare", "story", *without, *values]) == 0
    assert "compare nats per character" in capsys.readouterr().out


@pytest.fixture(scope="module")
def text() -> Text:
    tokenizer = word_level(stories(40), 20)
    rows = [tokenizer(text)["input_ids"] for text in stories(12)]
    validation = [{"input_ids": row, "labels": row} for row in rows]
    unknown = sum(row[1:].count(1) for row in rows)
    return Text(tokenizer, [], validation, 5, unknown, sum(map(len, stories(12))))


class TestScores:
    def test_are_plain_cross_entropy_and_accuracy(self, text: Text) -> None:
        model = tiny(vocab_size=20)
        found = score(model, text, batch_size=5)
        losses, hits = [], []
        for row in text.validation:  # one by one, without padding
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                logits = model(ids).logits[0, :-1].double()
            losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
            hits += (logits.argmax(-1) == ids[0, 1:]).tolist()
        assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert found.accuracy == sum(hits) / len(hits)
        assert text.unknown > 0
        expected = (sum(losses) + text.unknown * math.log(5)) / text.characters
        assert found.nats_per_character == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("size", [9, 60], ids=["of some words", "of every training word"])
    def test_unknown_words_are_charged_whatever_the_vocabulary_holds(self, size: int) -> None:
        texts = [Example("", text, None, "") for text in ("a b c d e f a b c d e f", "a quick brown fox")]
        args = training_options(
            SYSTEM, ["--datasets", "none", "--vocab-size", str(size), "--max-length", "6", "--batch-size", "1"]
        )
        made = encoded(args, SYSTEM, texts[:1], texts[1:], 1)
        kinds = 3 if size == 60 else 4  # the validation text's three, and the letter that 9 ids have no room for
        assert (made.unknown, made.unknown_kinds) == (3, kinds)
        model = tiny(vocab_size=len(made.tokenizer))
        free = score(model, replace(made, unknown=0), 1).nats_per_character
        charged = score(model, made, 1).nats_per_character
        assert charged - free == pytest.approx(3 * math.log(kinds) / len("a quick brown fox"))

    @pytest.mark.parametrize(("length", "places"), [(5, 4), (9, 8), (15, 7), (16, 8), (128, 8)])
    def test_a_row_is_asked_again_at_eight_places_at_most(self, length: int, places: int, text: Text) -> None:
        class Counting(torch.nn.Module):
            device = torch.device("cpu")
            asked = 0

            def forward(self, input_ids: Any, attention_mask: Any) -> Namespace:
                self.asked += 1
                return Namespace(logits=torch.zeros(*input_ids.shape, 20))

        row = {"input_ids": [5] * length, "labels": [5] * length}
        score(model := Counting(), replace(text, validation=[row]), 1)
        assert model.asked - 1 == places  # one pass is of the whole row

    def test_a_causal_model_has_no_leak(self, text: Text) -> None:
        assert score(tiny(vocab_size=20), text, 5).leak == 0

    def test_one_that_sees_the_answer_has(self, text: Text) -> None:
        class Copies(torch.nn.Module):
            """Says the token that follows, where it is there to be seen."""

            device = torch.device("cpu")

            def forward(self, input_ids: Any, attention_mask: Any) -> Namespace:
                following = torch.nn.functional.pad(input_ids[:, 1:], (0, 1))
                return Namespace(logits=torch.nn.functional.one_hot(following, 20).float())

        found = score(Copies(), text, 5)
        assert found.accuracy == 1
        assert found.leak > 0.9

    def test_what_a_leak_is_worth_is_told_of_the_same_places(self, found: dict[str, Any]) -> None:
        leaky = copy.deepcopy(found)
        leaky["arms"]["2"] |= {"prefix_accuracy": {"mean": 0.125}, "leak": {"mean": 0.5}}
        assert "right in 12.5%, and at the same places with the text in view in 62.5%" in table(leaky)

    def test_no_share_is_shown_beyond_its_bounds(self) -> None:
        assert within({"mean": 0.98, "low": -0.1, "high": 1.2}) == {"mean": 0.98, "low": 0, "high": 1}


class TestIntervals:
    def test_of_a_run_that_diverged_are_none(self) -> None:
        assert all(math.isnan(value) for value in interval([math.nan, 1.0]).values())

    @pytest.mark.parametrize(("degrees", "known"), [(1, 12.706), (4, 2.776), (11, 2.201), (30, 2.042), (1000, 1.962)])
    def test_quantiles_of_students_t(self, degrees: int, known: float) -> None:
        assert student_t(degrees) == pytest.approx(known, abs=1e-3)

    def test_cover_what_they_say(self) -> None:
        draw = random.Random(0)
        held = 0
        for _ in range(2000):
            one = interval([draw.gauss(0, 1) for _ in range(4)])
            held += one["low"] <= 0 <= one["high"]
        assert held / 2000 == pytest.approx(0.95, abs=0.015)


REFUSED = {
    "one_seed": (["--seeds", "1"], "one run shows no spread"),
    "a_broken_budget": (["--tokens", "100"], "no whole number of steps"),
    "one_arm": (["--values", "1"], "takes two different ones"),
    "the_same_twice": (["--values", "1,1"], "stands there twice"),
    "steps_of_its_own": (["--max-steps", "5"], "--max-steps is settled by the comparison"),
    "alerts": (["--stop-on-alert"], "--stop-on-alert is settled by the comparison, or has no effect in it"),
    "samples": (["--sample-every=5"], "--sample-every is settled by the comparison, or has no effect in it"),
    "the_same_rate_twice": (["--vary", "rate", "--values", "1e-3,0.001"], "1e-3 and 0.001 are the same arm"),
    "a_size_by_name": (["--vary", "size", "--values", "small,64"], "'small' is no value of --values with --vary size"),
    "a_vocabulary_without_size": (["--vary", "vocabulary", "--values", "character,word:50"], "as in character:80"),
    "what_varies_fixed": (["--phase", "2"], "--phase is settled by the comparison"),
    "an_unknown_option": (["--fast"], "unrecognized arguments: --fast"),
    "an_unknown_phase": (["--values", "1,3"], "invalid choice: '3'"),
    "a_base": (["--model", "somewhere"], "fresh weights"),
}


@pytest.mark.parametrize(("options", "says"), REFUSED.values(), ids=REFUSED)
def test_refuses(options: list[str], says: str, file: Path, capsys: Any) -> None:
    given = [word for word in command(file) if "vocabulary" not in options or word not in ("--vocab-size", "60")]
    assert main(["compare", "story", *given, *options]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_arms_on_other_texts_do_not_compare(file: Path) -> None:
    args = training_options(SYSTEM, ["--datasets", str(file), *SMALL])
    other = Namespace(**{**vars(args), "seed": 1})
    with pytest.raises(UsageError, match=r"--seed is 0 for a and 1 for b"):
        compare(SYSTEM, {"a": args, "b": other}, seeds=2, tokens=STEP, prompt="once")


@pytest.mark.parametrize("vary", VARIED)
def test_every_usual_value_is_one_that_train_takes(vary: str, file: Path) -> None:
    usual, arguments = VARIED[vary]
    made = [training_options(SYSTEM, ["--datasets", str(file), *arguments(value)]) for value in usual.split(",")]
    assert len({json.dumps(vars(args), sort_keys=True) for args in made}) == len(made)
