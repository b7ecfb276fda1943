"""What is wrong is said in one line with exit code 2, and nothing is written or overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fixtures.datasets import competition_problems, word_problems, write
from models.training.cli import main
from tests.models_cli.conftest import options


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The message of a command that must exit with 2."""
    assert main(list(command)) == 2
    message = capsys.readouterr().err
    assert message.startswith("models: error: ")
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--batch-size", "0"], "0 is not at least 1"),
        (["--learning-rate", "-1"], "is not above 0"),
        (["--learning-rate", "fast"], "invalid number value: 'fast'"),
        (["--fp16"], "--fp16 needs an accelerator"),
        (["--fp16", "--bf16"], "not allowed with argument"),
        (["--epochs", "1"], "not allowed with argument"),
        (["--no-such-option"], "--no-such-option"),
        (["--experiment-name", "../elsewhere"], "letters, digits"),
        (["--max-length", "96", "--gate-l1", "1"], "give --control-heads too"),
        (["--vocab-size", "100"], "byte pairs need at least 260"),
        (["--model", "./nowhere"], "there is no such directory"),
        (["--datasets", ","], "names no data set"),
        (["--datasets", "./nowhere"], "no such file or folder"),
        (["--datasets", "no-such-set-anywhere"], "loading no-such-set-anywhere from the hub failed"),
    ],
    ids=lambda value: " ".join(value).strip("-") if isinstance(value, list) else "",
)
def test_bad_options(wrong: list[str], says: str, shelf: Path, tmp_path: Path, capsys: Any) -> None:
    given = options(shelf, tmp_path / "out")
    given = [*given, *wrong]
    assert says in refused(capsys, "train", "adaptive", *given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"query": "2 + 2", "reply": "4"}], "its columns are query, reply"),
        ([{"question": "2 + 2?", "answer": "It is 4."}], "has no final answer (a line '#### N'"),
        ([{"question": " ", "answer": "#### 4"}], "train row 0: the column 'question' is empty"),
        ([{"question": "2 + 2?", "answer": None}, {"question": "2?", "answer": "#### 2"}], "'answer' is empty (None)"),
        ([{"problem": "2 + 2?", "solution": "$\\boxed{4$"}], "has no final answer"),
        ([{"text": ""}, {"text": "  "}], "blank rows only"),
        ([], "train.jsonl is empty"),
    ],
    ids=["columns", "answer", "empty question", "no answer", "open box", "blank text", "no rows"],
)
def test_bad_data(rows: list[dict[str, str]], says: str, shelf: Path, tmp_path: Path, capsys: Any) -> None:
    place = write(tmp_path / "data", rows)
    message = refused(capsys, "train", "adaptive", *options(shelf, tmp_path / "out", "--datasets", str(place)))
    assert says in message
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_json(shelf: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": \n')
    place = str(tmp_path / "train.jsonl")
    message = refused(capsys, "train", "adaptive", *options(shelf, tmp_path / "out", "--datasets", place))
    assert "train.jsonl cannot be read" in message


def test_a_folder_without_a_train_file(shelf: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    message = refused(capsys, "train", "adaptive", *options(shelf, tmp_path / "out", "--datasets", str(tmp_path)))
    assert "has no train file" in message
    assert "it holds notes.txt" in message


class TestTooLong:
    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        rows = [*word_problems(12), {"question": "How many? " * 60, "answer": "#### 1"}]
        return str(write(tmp_path / "long", rows))

    def test_is_refused_and_named(self, place: str, shelf: Path, tmp_path: Path, capsys: Any) -> None:
        message = refused(capsys, "train", "adaptive", *options(shelf, tmp_path / "out", "--datasets", place))
        assert "1 of 12 examples are longer than --max-length 96" in message  # one of the 13 rows is held out
        assert "train row 12" in message
        assert "--too-long drop" in message

    def test_is_left_out_where_asked(self, place: str, shelf: Path, tmp_path: Path) -> None:
        given = options(shelf, tmp_path / "out", "--datasets", place, "--too-long", "drop")
        assert main(["train", "adaptive", *given, "--max-steps", "1"]) == 0
        found = json.loads((tmp_path / "out" / "adaptive" / "results.json").read_text())
        assert found["data"]["train"] | {"sha256": ""} == {"examples": 12, "used": 11, "too_long": 1, "sha256": ""}

    def test_all_of_them_is_an_error(self, shelf: Path, tmp_path: Path, capsys: Any) -> None:
        given = options(shelf, tmp_path / "out", "--too-long", "drop", "--max-length", "5")
        assert "no example is left to train on" in refused(capsys, "train", "adaptive", *given)

    def test_the_models_positions_are_a_limit_too(
        self, trained: Path, shelf: Path, tmp_path: Path, capsys: Any
    ) -> None:
        given = options(shelf, tmp_path / "out", "--model", str(trained / "final"), "--max-length", "4096")
        assert "--max-length 4096: the model has 128 positions" in refused(capsys, "train", "adaptive", *given)


class TestNothingIsOverwritten:
    def test_an_experiment_that_is_there(self, trained: Path, shelf: Path, capsys: Any) -> None:
        before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
        message = refused(
            capsys, "train", "adaptive", *options(shelf, trained.parent, "--experiment-name", trained.name)
        )
        assert "is there already" in message
        assert "--resume" in message
        assert {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()} == before

    def test_resuming_with_other_options(self, trained: Path, shelf: Path, capsys: Any) -> None:
        given = options(shelf, trained.parent, "--experiment-name", trained.name, "--batch-size", "2", "--resume")
        assert "--batch-size was 4 and is 2" in refused(capsys, "train", "adaptive", *given)

    def test_resuming_what_is_not_there(self, shelf: Path, tmp_path: Path, capsys: Any) -> None:
        message = refused(capsys, "train", "adaptive", *options(shelf, tmp_path / "out", "--resume"))
        assert "there is no experiment" in message
        assert not (tmp_path / "out").exists()

    def test_resuming_before_the_first_checkpoint(
        self, shelf: Path, tmp_path: Path, capsys: Any, trained: Path
    ) -> None:
        (tmp_path / "first").mkdir()
        written = json.loads((trained / "options.json").read_text()) | {"output_dir": str(tmp_path)}
        (tmp_path / "first" / "options.json").write_text(json.dumps(written))
        again = [
            "--max-steps", "8", "--control-heads", "--head-warmup", "2", "--head-every", "2", "--resume",
            "--experiment-name", "first",
        ]  # fmt: skip
        assert "has no checkpoint yet" in refused(capsys, "train", "adaptive", *options(shelf, tmp_path, *again))

    def test_figures_and_plots(self, tmp_path: Path, capsys: Any) -> None:
        for option in ("--json", "--plot"):
            file = tmp_path / "there.png"
            file.write_text("mine")
            assert "is there already" in refused(capsys, "compare", "adaptive", option, str(file))
            assert file.read_text() == "mine"


def test_an_unknown_system_suggests_the_nearest(capsys: Any) -> None:
    assert "there is no system 'adaptiv'; did you mean adaptive?" in refused(capsys, "train", "adaptiv")


def test_a_base_of_another_kind(shelf: Path, tmp_path: Path, capsys: Any) -> None:
    from transformers import LlamaConfig

    from models.training.tokenizing import byte_pairs

    LlamaConfig(vocab_size=300, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "base")
    byte_pairs([row["question"] for row in word_problems(40)], 300).save_pretrained(tmp_path / "base")
    given = options(shelf, tmp_path / "out", "--model", str(tmp_path / "base"))
    assert "not from llama" in refused(capsys, "train", "adaptive", *given)


@pytest.mark.parametrize("command", [["generate", "./nowhere", "--prompt", "a"], ["diagnose", "nowhere"]])
def test_a_checkpoint_that_is_not_there(command: list[str], capsys: Any) -> None:
    assert "no such directory" in (message := refused(capsys, *command)) or "is no directory" in message


def test_competition_problems_are_what_the_hub_gives() -> None:
    assert set(competition_problems(1)[0]) == {"problem", "solution", "level", "type"}
