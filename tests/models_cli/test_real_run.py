"""GSM8K with LoRA on a small base of our own, through the command line: minutes, and data that users bring."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from models.training.cli import main

DATA = os.environ.get("LMCONFORM_DATA", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not DATA or not (Path(DATA) / "gsm8k").is_dir(), reason="LMCONFORM_DATA names no folder that holds gsm8k"
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 250 thousand parameters, trained for 200 steps on the questions and answers themselves."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from models.training import options
    from models.training.run import train
    from models.training.systems import System

    def build(args: Namespace, tokenizer: Any) -> GPT2LMHeadModel:
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer), n_positions=512, n_embd=64, n_layer=3, n_head=4,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            )
        )  # fmt: skip

    folder = tmp_path_factory.mktemp("base")
    from argparse import ArgumentParser

    parser = ArgumentParser()
    options.add_shared(parser)
    args = parser.parse_args(
        [
            "--datasets", f"{DATA}/gsm8k", "--max-steps", "200", "--max-length", "256", "--too-long", "drop",
            "--batch-size", "4", "--vocab-size", "1024", "--learning-rate", "3e-3", "--eval-samples", "0",
            "--output-dir", str(folder), "--experiment-name", "base", "--quiet", "--cpu",
        ]
    )  # fmt: skip
    args.system = "gpt2"
    train(args, System(name="gpt2", summary="", sizes={}, build=build))
    return folder / "base" / "final"


@pytest.mark.parametrize("system", [["adaptive"], ["positional", "--pe", "rope"]], ids=["adaptive", "rope"])
def test_lora_learns_gsm8k(system: list[str], base: Path, tmp_path: Path) -> None:
    code = main(
        [
            "train", *system, "--model", str(base), "--datasets", f"{DATA}/gsm8k", "--use-lora", "--lora-r", "16",
            "--max-steps", "200", "--max-length", "256", "--too-long", "drop", "--batch-size", "4",
            "--learning-rate", "2e-3", "--eval-samples", "32", "--max-new-tokens", "64", "--output-dir", str(tmp_path),
            "--experiment-name", "run", "--quiet", "--cpu",
        ]
    )  # fmt: skip
    assert code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"]
    assert 0 < results["parameters"]["trained"] < results["parameters"]["total"] / 2
    assert results["after"]["exact_match"]["asked"] > 0
    if kept := os.environ.get("LMCONFORM_KEEP"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        (Path(kept) / f"{system[-1]}.json").write_text(json.dumps(results, indent=2))
