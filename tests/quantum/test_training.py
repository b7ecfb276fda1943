"""`python -m models train|generate|compare|diagnose quantum`, on sentences by rule, and on real text once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fixtures.tokenizers import sentences
from lmconform.monitors import generated
from lmconform.monitors.samples import sample_figures
from models.quantum import QuantumForCausalLM, reference
from models.quantum.reference import norm
from models.quantum.system import tiny
from models.training.cli import main
from models.training.data import encode, hold_out, load_examples


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sentences.txt"
    file.write_text("\n".join(sentences(300)))
    return file


def options(text: Path, out: Path, *more: str) -> list[str]:
    return [
        "--datasets", str(text), "--text-unit", "line", "--max-length", "32", "--vocab-size", "64", "--batch-size", "8",
        "--eval-samples", "8", "--quiet", "--cpu", "--output-dir", str(out), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty steps with every option of the system; the folder."""
    out = tmp_path_factory.mktemp("experiments")
    more = ["--interference", "--balance", "0.5", "--eos-weight", "0.5", "--sample-every", "20", "--max-steps", "40"]
    assert main(["train", "quantum", *options(text, out, *more)]) == 0
    return out / "quantum"


def test_what_a_run_leaves(trained: Path) -> None:
    results = json.loads((trained / "results.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"] - 1
    assert results["alerts"] == []
    lines = [json.loads(line) for line in (trained / "monitors.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["monitor"] == "SampleMonitor"] == [1, 20, 40]


def test_the_model_and_its_tokenizer_load(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained / "final")
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    assert isinstance(model, QuantumForCausalLM)
    assert model.config.interference
    assert model.config.vocab_size == len(tokenizer)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        0, 1, 2, 3,
    )  # fmt: skip
    ids = tokenizer.encode("Once the CAT saw nothing!")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.encode("once", add_special_tokens=False) == ids[1:2]
    assert tokenizer.decode([*ids[:3], 3, 0], skip_special_tokens=True) == "once the"


def test_an_unchanged_loss_is_the_models_own(text: Path, tmp_path: Path) -> None:
    """Factors of 0 and 1 train as no factor does."""
    curves = []
    for name, more in (("none", []), ("neutral", ["--balance", "1e-30"])):
        arguments = options(text, tmp_path, "--experiment-name", name, *more, "--max-steps", "3")
        assert main(["train", "quantum", *arguments]) == 0
        curves.append([loss for _, loss in json.loads((tmp_path / name / "results.json").read_text())["loss_curve"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_it_goes_on_from_a_checkpoint(trained: Path, text: Path, tmp_path: Path) -> None:
    more = ["--model", str(trained / "final"), "--eos-weight", "0.5", "--max-steps", "2"]
    assert main(["train", "quantum", *options(text, tmp_path, *more)]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "quantum" / "final").config.interference


def test_generate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "once the", "--temperature", "1", "--max-new-tokens", "12", "--json"]
    assert main(["generate", str(trained / "final"), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["written"].strip()


@pytest.mark.parametrize("more", [[], ["--interference", "--size", "small"]], ids=["tiny", "small"])
def test_compare_with_the_complex_definition(more: list[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert main(["compare", "quantum", *more, "--json", str(file)]) == 0
    figures: dict[str, Any] = json.loads(file.read_text())
    assert figures["agrees"]
    for place in (*figures["layers"], figures["logits"]):
        assert place["float64"] < place["allowed"] < 1e-12
        assert 0 < place["float32"] < 1e-4


def test_compare_fails_where_the_definition_is_another(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """By one part in a billion: far below what float32 can tell."""

    def nearly(module: Any, z: torch.Tensor) -> torch.Tensor:
        return norm(module, z) * (1 + 1e-9)

    monkeypatch.setattr(reference, "norm", nearly)
    assert main(["compare", "quantum"]) == 1
    assert "differs by more than rounding" in capsys.readouterr().out


def test_compare_takes_a_checkpoint_in_float64(tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    tiny().double().save_pretrained(tmp_path)
    assert main(["compare", "quantum", "--model", str(tmp_path)]) == 0


def test_diagnose(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--select", "contract.shape,scale.signs,tokenizer.flags", "--no-isolate"]
    assert main(["diagnose", str(trained / "final"), *arguments]) == 0
    assert "all 3 checks that ran hold" in " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "quantum", "--datasets", "x", "--eos-weight", "-1"], "is not from 0"),
        (["compare", "quantum", "--time", "1000"], "the model has 128 positions"),
    ],
)
def test_refusals(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LMCONFORM_DATA"), reason="LMCONFORM_DATA names no folder with real text")
def test_on_stories_it_keeps_to_the_corpus(tmp_path: Path) -> None:
    """EOS within twice its frequency, coverage within a fifth of the corpus', samples neither empty nor alike."""
    where = str(Path(os.environ["LMCONFORM_DATA"]) / "tinystories" / "tiny_stories.txt")
    more = ["--vocab-size", "2048", "--max-length", "64", "--batch-size", "16", "--max-steps", "300"]
    arguments = [*options(Path(where), tmp_path), *more, "--text-unit", "story", "--eval-samples", "64"]
    assert main(["train", "quantum", *arguments]) == 0
    results = json.loads((tmp_path / "quantum" / "results.json").read_text())
    assert results["alerts"] == []
    folder = tmp_path / "quantum" / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    _, held = hold_out(load_examples(where, "train", unit="story"), 64)
    rows, _ = encode(held, tokenizer, 64)
    ids = torch.tensor([row["input_ids"] for row in rows if len(row["input_ids"]) == 64])
    with torch.no_grad():
        predicted = torch.cat([model(part).logits[:, :-1].softmax(-1).mean((0, 1))[None] for part in ids.split(16)])
    share, own = float(predicted.mean(0)[3]), float((ids[:, 1:] == 3).float().mean())
    assert own / 2 < share < own * 2

    samples = generated([[2]] * 64, max_new_tokens=63, pad_token_id=0, eos_token_id=3)(model)
    figures, tokens = sample_figures(samples), [token for row in samples for token in row]
    text = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].flatten()
    words, corpus_words = len(set(tokens)), len(set(text[: len(tokens)].tolist()))
    print(f"EOS {share:.2%} (corpus {own:.2%}); {words} words in {len(tokens)} (corpus {corpus_words}); {figures}")
    print(tokenizer.decode(samples[0]))
    assert 0.8 < words / corpus_words < 1.2
    assert figures["empty"] == 0
    assert figures["repetition"] is not None
    assert figures["repetition"] < 0.1
