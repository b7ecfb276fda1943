"""`generate`, `compare` and `diagnose`, and what stands behind them: answers, labels, padding, smoothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fixtures.datasets import competition_problems, word_problems
from models.training.answers import final_answer, is_match, normalise
from models.training.cli import load, main
from models.training.data import Example, PadRight, data_hash, encode, load_examples
from models.training.evaluation import generate, left_padded
from models.training.losses import smoothed
from models.training.tokenizing import byte_pairs, with_padding


class TestGenerate:
    def test_writes_behind_every_prompt(self, trained: Path, capsys: Any) -> None:
        prompts = ["Question: How many apples", "Ann"]
        given = [word for prompt in prompts for word in ("--prompt", prompt)]
        assert main(["generate", str(trained / "final"), *given, "--max-new-tokens", "5", "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["prompt"] for line in lines] == prompts

    def test_a_batch_of_prompts_is_written_as_each_alone(self, trained: Path) -> None:
        model, tokenizer = load(str(trained / "final"))
        prompts = ["Ann has", "Question: Ben has 3 books and gets 4 more.", "7"]
        together = generate(model, tokenizer, prompts, max_new_tokens=12, do_sample=False)
        alone = [generate(model, tokenizer, [prompt], max_new_tokens=12, do_sample=False)[0] for prompt in prompts]
        assert together == alone

    def test_samples_by_seed(self, trained: Path, capsys: Any) -> None:
        written = []
        for seed in ("1", "1", "2"):
            given = ["--prompt", "Ann", "--temperature", "2", "--top-p", "0.9", "--top-k", "50", "--seed", seed]
            assert main(["generate", str(trained / "final"), *given]) == 0
            written.append(capsys.readouterr().out)
        assert written[0] == written[1] != written[2]


class TestCompare:
    def test_shows_every_layer_and_draws_it(self, tmp_path: Path, capsys: Any) -> None:
        figures, plot = tmp_path / "parity.json", tmp_path / "parity.svg"
        assert main(["compare", "adaptive", "--float64", "--json", str(figures), "--plot", str(plot)]) == 0
        found = json.loads(figures.read_text())
        assert found["logits_difference"] <= 1e-10
        assert len(found["layers"]) == 5
        assert all(abs(layer["rms_ratio"] - 1) <= 1e-5 for layer in found["layers"])
        assert "<svg" in plot.read_text()
        assert "same likeliest token 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["system", "checkpoint"])
def test_diagnose_is_the_suite(what: str, trained: Path, capfd: Any) -> None:
    subject = "adaptive" if what == "system" else str(trained / "final")
    assert main(["diagnose", subject, "--select", "contract.shape,cache.chunks", "--quiet", "--no-isolate"]) == 0
    assert "no finding" in capfd.readouterr().out


class TestAnswers:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("6 * 3 = 18\n#### 18", "18"),
            ("#### 5\nno, wait\n#### 1,234", "1,234"),
            ("so $\\boxed{\\frac{1}{2}}$ and \\boxed{\\sqrt{2}}", "\\sqrt{2}"),
            ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
            ("no answer", None),
            ("####", None),
            ("\\boxed{never closed", None),
        ],
    )
    def test_are_found(self, text: str, answer: str | None) -> None:
        assert final_answer(text) == answer

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("18", "18.00"), ("$1,234", "1234"), ("-0.50", "-.5"), ("\\dfrac{1}{2}", "\\frac{1}{2}"), ("0", "-0"),
            ("50\\%", "50"), ("\\text{yes}", "Yes"), ("1000000", "1,000,000"), (" 7. ", "7"), ("+3", "3"),
        ],
    )  # fmt: skip
    def test_that_are_equal(self, one: str, other: str) -> None:
        assert normalise(one) == normalise(other)

    @pytest.mark.parametrize(("one", "other"), [("18", "81"), ("1/2", "2"), ("(1,2)", "12"), ("0.3", "0.30001")])
    def test_that_are_not(self, one: str, other: str) -> None:
        assert normalise(one) != normalise(other)

    def test_an_unmarked_answer_is_no_match(self) -> None:
        assert is_match("it is\n#### 4", "4")
        assert not is_match("it is 4", "4")


class TestEncoding:
    @pytest.fixture
    def tokenizer(self) -> Any:
        return byte_pairs([row["answer"] for row in word_problems(50)], 300)

    def test_labels_are_the_completion_and_its_end(self, tokenizer: Any) -> None:
        rows, _ = encode([Example("Question: 2 + 2?\nAnswer:", " 4\n#### 4", "4", "")], tokenizer, 64)
        labels = [label for label in rows[0]["labels"] if label != -100]
        assert tokenizer.decode(labels[:-1]) == " 4\n#### 4"
        assert labels[-1] == tokenizer.eos_token_id
        prompt = rows[0]["input_ids"][: len(rows[0]["labels"]) - len(labels)]
        assert tokenizer.decode(prompt) == "Question: 2 + 2?\nAnswer:"

    def test_padding_is_hidden_and_never_a_label(self, tokenizer: Any) -> None:
        examples = [Example("Q:", " " + "1 " * n, None, "") for n in (1, 5, 9)]
        rows, _ = encode(examples, tokenizer, 64)
        batch = PadRight(tokenizer.eos_token_id)(rows)  # the makeshift: EOS as padding
        for row, ids in enumerate(rows):
            real = len(ids["input_ids"])
            assert batch["attention_mask"][row].tolist() == [1] * real + [0] * (batch["input_ids"].shape[1] - real)
            assert (batch["labels"][row, real:] == -100).all()
            assert (batch["labels"][row] == tokenizer.eos_token_id).sum() == 1

    def test_plain_text_is_packed_with_its_ends(self, tokenizer: Any) -> None:
        texts = [Example("", f"{name} went home.", None, "") for name in ("Ann", "Ben", "Cleo")]
        rows, _ = encode(texts, tokenizer, 16)
        together = [token for row in rows for token in row["input_ids"]]
        assert together.count(tokenizer.eos_token_id) == 3
        assert all(len(row["input_ids"]) <= 16 and row["labels"] == row["input_ids"] for row in rows)

    def test_a_tokenizer_that_ends_every_text_is_not_obeyed(self) -> None:
        from fixtures.tokenizers import word_level

        tokenizer = word_level(ends=True)
        rows, _ = encode([Example("the cat", " saw a dog .", None, "")], tokenizer, 64)
        assert rows[0]["input_ids"].count(tokenizer.eos_token_id) == 1
        assert rows[0]["input_ids"][0] == tokenizer.bos_token_id

    def test_padding_gets_a_token_of_its_own(self, tokenizer: Any, tmp_path: Path) -> None:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(tmp_path)
        mended = with_padding(AutoTokenizer.from_pretrained(tmp_path))
        assert mended.pad_token_id != mended.eos_token_id

    def test_digits_are_tokens_of_their_own(self, tokenizer: Any) -> None:
        assert tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"]) == ["1", "2", "3", "4"]

    def test_prompts_are_padded_on_the_left(self) -> None:
        ids, mask = left_padded([[5, 6, 7], [8]], 0)
        assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
        assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_rows_are_shuffled_by_seed_and_hashed_in_their_order(shelf: Path) -> None:
    one, same, other = (load_examples(str(shelf / "gsm8k"), "train", seed=seed) for seed in (1, 1, 2))
    assert data_hash(one) == data_hash(same) != data_hash(other)
    assert sorted(example.prompt for example in one) == sorted(example.prompt for example in other)


def test_names_are_looked_up_in_the_users_folder(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCONFORM_DATA", str(shelf))
    assert len(load_examples("gsm8k,math", "train")) == 60
    assert load_examples("math", "test") == []


def test_gold_answers_are_those_of_the_rows(shelf: Path) -> None:
    golds = {example.gold for example in load_examples(str(shelf / "math"), "train")}
    assert golds == {final_answer(row["solution"]) for row in competition_problems(20)}


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_smoothing_shifts_and_skips(epsilon: float) -> None:
    """Against its closed form: (1 - e) of the negative log-likelihood and e of its mean over the vocabulary."""
    logits = torch.randn(2, 6, 11)
    labels = torch.randint(11, (2, 6))
    labels[0, :3] = labels[1, 5] = -100
    logs = logits[:, :-1].log_softmax(-1)
    target, counted = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
    each = -(1 - epsilon) * logs.gather(-1, target[..., None])[..., 0] - epsilon * logs.mean(-1)
    found = smoothed(epsilon)({"logits": logits}, labels)
    torch.testing.assert_close(found, each[counted].mean())
    halves = smoothed(epsilon)({"logits": logits}, labels, num_items_in_batch=2 * counted.sum())
    torch.testing.assert_close(halves, found / 2)
