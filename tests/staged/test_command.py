"""`python -m models train staged --stage N`, from stage to stage, and what it refuses; `diagnose`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fixtures.tokenizers import sentences
from models.training.cli import main


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library's cache of read files stays in the tests' own folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sentences.txt"
    file.write_text("\n".join(sentences(300)), encoding="utf-8")
    return file


def train(text: Path, out: Path, name: str, *more: str) -> int:
    return main(
        [
            "train", "staged", "--datasets", str(text), "--max-length", "32", "--max-steps", "4", "--batch-size", "4",
            "--vocab-size", "300", "--eval-samples", "8", "--quiet", "--cpu", "--output-dir", str(out),
            "--experiment-name", name, *more,
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experiments of four steps, each from the one before."""
    out = tmp_path_factory.mktemp("experiments")
    for stage in range(4):
        base = ["--model", str(out / f"stage{stage - 1}" / "final")] if stage else ["--full-mu"]
        assert train(text, out, f"stage{stage}", "--stage", str(stage), *base) == 0
    return out


@pytest.mark.parametrize("stage", range(4))
def test_each_stage_starts_where_the_one_before_ended(trained: Path, stage: int) -> None:
    results = json.loads((trained / f"stage{stage}" / "results.json").read_text())
    told = results["staged"]
    assert told["parts"] == ["MU", "TEMPORAL", "K-1", "graph routing"][: stage + 1]
    assert told["graph_openness"] == (0 if stage == 3 else 1)
    assert (told["credit"] is not None) == (stage >= 2)
    if stage:
        before = json.loads((trained / f"stage{stage - 1}" / "results.json").read_text())
        assert told["jump"] <= 1e-5
        assert results["before"]["loss"] == pytest.approx(before["after"]["loss"], rel=1e-5)
    else:
        assert told["jump"] is None


def test_the_jump_is_printed(trained: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(text, tmp_path, "again", "--stage", "1", "--model", str(trained / "stage0" / "final")) == 0
    assert "stage 0 to 1: logits move by at most 0.0e+00" in capsys.readouterr().out


REFUSED = {
    "a_stage_without_the_one_before": (["--stage", "2"], "starts from a checkpoint of stage 1"),
    "a_stage_that_is_skipped": (["--stage", "2", "--model", "stage0"], "train stage 1 first"),
    "a_way_back": (["--stage", "1", "--model", "stage3", "--skip-stages"], "cannot be taken out again"),
    "a_matrix_behind_a_plain_embedding": (["--full-mu", "--model", "simple"], "with a plain embedding"),
    "another_system": (["--model", "llama"], "not from llama"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, trained: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    options, reason = REFUSED[case]
    base = options[options.index("--model") + 1] if "--model" in options else None
    place = trained / str(base) / "final"
    if base in ("simple", "llama"):
        place = foreign(base, trained, tmp_path)
    given = [str(place) if option == base else option for option in options]
    assert train(text, tmp_path / "out", "refused", *given) == 2
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def foreign(kind: str, trained: Path, folder: Path) -> Path:
    """A checkpoint that the command must not take, with the tokenizer of one that it would."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from models.staged.system import tiny

    sizes: dict[str, int] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 300}
    made: Any = tiny(full=False) if kind == "simple" else LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    made.save_pretrained(folder / kind)
    AutoTokenizer.from_pretrained(trained / "stage0" / "final").save_pretrained(folder / kind)
    return folder / kind


def test_stages_are_skipped_when_that_is_said(text: Path, tmp_path: Path) -> None:
    assert train(text, tmp_path, "at_once", "--stage", "3", "--skip-stages", "--no-credit") == 0
    told = json.loads((tmp_path / "at_once" / "results.json").read_text())["staged"]
    assert told["stage"] == 3
    assert told["credit"] is None


def test_a_run_of_the_last_stage_goes_on_where_it_stopped(trained: Path, text: Path, tmp_path: Path) -> None:
    """The graph's closing finds its place by the step, and ends as in one run."""
    options = ["--stage", "3", "--model", str(trained / "stage2" / "final"), "--graph-steps", "4", "--save-steps", "2"]
    assert train(text, tmp_path, "whole", *options) == 0
    assert train(text, tmp_path, "parts", *options, "--max-steps", "2") == 0
    assert train(text, tmp_path, "parts", *options, "--resume") == 0
    whole, parts = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts"))
    assert parts["staged"]["graph_openness"] == whole["staged"]["graph_openness"] == 0


@pytest.mark.parametrize("what", ["system", "checkpoint"])
def test_diagnose_shows_parameters_gradients_memory_and_writing(what: str, trained: Path, capfd: Any) -> None:
    subject = "staged" if what == "system" else str(trained / "stage3" / "final")
    assert main(["diagnose", subject, "--select", "contract.shape", "--quiet", "--no-isolate"]) == 0
    told = capfd.readouterr().out
    for part in ("embedding", "MU", "projector", "operator 1", "head"):
        assert f"\n{part} " in told
    assert "below 0.1 after" in told
    assert ("The capital of India is New Delhi" in told.partition("having memorised it")[2]) == (what == "checkpoint")
    assert "no finding" in told
