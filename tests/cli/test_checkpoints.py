"""A directory is a checkpoint: safetensors, or a pickle that is read with weights_only; a tokenizer if it is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Trap:
    """A pickle that runs code when it is loaded carelessly."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoints")
    config = LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "with_tokenizer")
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "with_tokenizer")
    for name, state in (("pickle", model.state_dict()), ("trap", {"x": Trap(folder / "sprung")})):
        (folder / name).mkdir()
        model.config.save_pretrained(folder / name)
        torch.save(state, folder / name / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def ran(checkpoints: Path, lmconform: Callable[..., Any]) -> Any:
    names = ["with_tokenizer", "pickle", "trap"]
    return lmconform("check", *names, "--select", "contract.shape", "--as-loaded", cwd=checkpoints)


@pytest.mark.parametrize("name", ["with_tokenizer", "pickle"])
def test_checkpoint_is_checked(ran: Any, name: str) -> None:
    assert f"  {name}: no finding, the one check that ran holds." in ran.out


def test_pickles_are_never_run(ran: Any, checkpoints: Path) -> None:
    assert ran.code == 2
    assert "trap could not be built: loading the checkpoint raised" in ran.err
    assert not (checkpoints / "sprung").exists()
    assert "Traceback" not in ran.err
