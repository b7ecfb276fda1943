"""`python -m models compare story`: what stays the same in all arms, the figures, and what is refused."""

from __future__ import annotations

import json
import math
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.subjects.story import stories
from models.story.system import SYSTEM, VARIED, tiny
from models.training.cli import main
from models.training.comparison import Text, compare, interval, score, student_t, table
from models.training.errors import UsageError
from models.training.systems import training_options
from models.training.words import word_level

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


def test_a_text_that_is_held_out_is_not_trained_on(file: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.txt"
    twice.write_text(file.read_text() + "\n" + file.read_text())
    args = training_options(SYSTEM, ["--datasets", str(twice), *SMALL])
    made = compare(SYSTEM, {"a": args, "b": Namespace(**vars(args))}, seeds=2, tokens=STEP, prompt="once")
    assert made["data"]["left_out"] >= 6  # most of the eight have their twin among the others
    assert made["differences"]["b"]["loss"] == {"mean": 0, "low": 0, "high": 0}  # equal arms, equal runs


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


class TestIntervals:
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
    "what_varies_fixed": (["--phase", "2"], "--phase is settled by the comparison"),
    "an_unknown_option": (["--fast"], "unrecognized arguments: --fast"),
    "an_unknown_phase": (["--values", "1,3"], "invalid choice: '3'"),
    "a_base": (["--model", "somewhere"], "fresh weights"),
}


@pytest.mark.parametrize(("options", "says"), REFUSED.values(), ids=REFUSED)
def test_refuses(options: list[str], says: str, file: Path, capsys: Any) -> None:
    assert main(["compare", "story", *command(file), *options]) == 2
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
