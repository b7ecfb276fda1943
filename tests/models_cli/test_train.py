"""`python -m models train`: what a run leaves behind, LoRA, checkpointing, resuming."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.adaptive import AdaptiveForCausalLM
from models.training.cli import main
from tests.models_cli.conftest import options


class TestResults:
    def test_versions_seed_and_options_are_there(self, results: dict[str, Any]) -> None:
        assert results["schema_version"] == 1
        assert results["system"] == "adaptive"
        assert results["seed"] == 0
        assert results["versions"]["torch"] == torch.__version__
        assert {"python", "transformers", "datasets", "peft"} <= results["versions"].keys()
        assert results["options"]["learning_rate"] == 5e-3

    def test_data_is_named_and_hashed(self, results: dict[str, Any]) -> None:
        assert results["data"]["train"]["examples"] == 40
        assert results["data"]["eval"]["examples"] == 4
        assert len(results["data"]["train"]["sha256"]) == 64
        assert results["data"]["train"]["sha256"] != results["data"]["eval"]["sha256"]

    def test_losses_and_exact_match_before_and_after(self, results: dict[str, Any]) -> None:
        assert results["steps"] == 8
        assert results["loss_curve"][0][0] == 1
        assert results["after"]["loss"] < results["before"]["loss"]
        for when in ("before", "after"):
            match = results[when]["exact_match"]
            assert match["asked"] == 4
            assert match["share"] == match["correct"] / 4
        assert set(results["seconds"]) == {"evaluate_before", "train", "evaluate_after"}

    def test_the_systems_own_record(self, results: dict[str, Any], trained: Path) -> None:
        own = results["adaptive"]
        assert own["heads"] == 16
        assert [look["step"] for look in own["looks"]] == [2, 4, 6, 8]
        assert own["heads_left"] == 16 - sum(map(len, own["removed"].values()))

    def test_monitors_have_written(self, trained: Path) -> None:
        lines = [json.loads(line) for line in (trained / "monitors.jsonl").read_text().splitlines()]
        assert {"CollapseMonitor", "GradientMonitor", "EffectiveRateMonitor"} <= {line["monitor"] for line in lines}

    def test_the_model_loads_with_its_tokenizer(self, trained: Path, results: dict[str, Any]) -> None:
        model = AutoModelForCausalLM.from_pretrained(trained / "final")
        tokenizer = AutoTokenizer.from_pretrained(trained / "final")
        assert isinstance(model, AdaptiveForCausalLM)
        assert sum(p.numel() for p in model.parameters()) == results["parameters"]["total"]
        assert model.config.vocab_size == len(tokenizer)
        assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


def test_the_same_seed_gives_the_same_run(shelf: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        assert main(["train", "adaptive", *options(shelf, tmp_path, "--experiment-name", name)]) == 0
        found.append(json.loads((tmp_path / name / "results.json").read_text()))
    assert found[0]["loss_curve"] == found[1]["loss_curve"]
    assert found[0]["after"]["loss"] == found[1]["after"]["loss"]
    assert found[0]["data"] == found[1]["data"]


def test_a_resumed_run_ends_as_an_uninterrupted_one(shelf: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Killed after its second of four checkpoints, then gone on with."""
    from transformers import TrainerCallback

    from models.training import run

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    command = ["train", "adaptive", *options(shelf, tmp_path, "--save-steps", "1", "--weight-decay", "0.1")]
    assert main([*command, "--experiment-name", "whole"]) == 0
    with monkeypatch.context() as patch:
        made = run._trainer

        def killed(*args: Any) -> Any:
            trainer, monitors = made(*args)
            trainer.add_callback(Kill())
            return trainer, monitors

        patch.setattr(run, "_trainer", killed)
        assert main([*command, "--experiment-name", "cut"]) == 130
    assert not (tmp_path / "cut" / "results.json").exists()
    assert main([*command, "--experiment-name", "cut", "--resume"]) == 0
    whole, cut = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut"))
    assert cut["after"]["loss"] == whole["after"]["loss"]
    assert cut["before"] == whole["before"]
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "final").state_dict() for name in ("whole", "cut")]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=0)
    assert main([*command, "--experiment-name", "cut", "--resume"]) == 2  # finished: no step more
    assert json.loads((tmp_path / "cut" / "results.json").read_text()) == cut


def test_lora_on_a_base_with_checkpointing_in_half_precision(trained: Path, shelf: Path, tmp_path: Path) -> None:
    code = main(
        [
            "train", "adaptive", *options(shelf, tmp_path, "--model", str(trained / "final"), "--use-lora"),
            "--lora-r", "4", "--gradient-checkpointing", "--bf16", "--experiment-name", "lora", "--accumulation", "2",
        ]
    )  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "lora" / "results.json").read_text())
    assert 0 < found["parameters"]["trained"] < found["parameters"]["total"]
    assert found["after"]["loss"] < found["before"]["loss"]
    assert (tmp_path / "lora" / "adapter" / "adapter_config.json").is_file()
    base = AutoModelForCausalLM.from_pretrained(trained / "final")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "final", dtype=torch.float32)
    assert merged.config.kept_heads == base.config.kept_heads
    attn, before = merged.transformer.h[0].attn.c_attn.weight, base.transformer.h[0].attn.c_attn.weight
    assert (attn - before).norm() > 1e-4  # the adapter is in it


def test_two_data_sets_and_label_smoothing(shelf: Path, tmp_path: Path) -> None:
    both = f"{shelf / 'gsm8k'},{shelf / 'math'}"
    command = ["train", "adaptive", *options(shelf, tmp_path, "--datasets", both, "--label-smoothing", "0.1")]
    assert main(command) == 0
    found = json.loads((tmp_path / "adaptive" / "results.json").read_text())
    assert found["data"]["train"]["examples"] == 60
    # what is evaluated is plain cross-entropy, on which random weights score the logarithm of the vocabulary
    assert found["before"]["loss"] == pytest.approx(5.7, abs=0.25)


def test_progress_is_shown_without_quiet(shelf: Path, tmp_path: Path, capsys: Any) -> None:
    command = [word for word in options(shelf, tmp_path, "--max-steps", "2") if word != "--quiet"]
    assert main(["train", "adaptive", *command]) == 0
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert "exact match" in shown.out


def test_runs_as_a_module() -> None:
    shown = subprocess.run([sys.executable, "-m", "models", "--help"], capture_output=True, text=True, check=True)
    for command in ("train", "generate", "compare", "diagnose"):
        assert command in shown.stdout
