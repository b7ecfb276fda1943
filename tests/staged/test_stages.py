"""From stage to stage: nothing jumps, nothing is lost, and every stage memorises a sentence."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from fixtures.system_recipe import tokenizer
from fixtures.tokenizers import sentences
from models.staged import StagedConfig, StagedForCausalLM
from models.staged.credit import HierarchicalCredit
from models.staged.stages import TOLERANCE, GraphClosing, at_stage, jump
from models.staged.system import probe, tiny
from models.training.data import Example, PadRight, encode

WAYS = [(0, 1), (1, 2), (2, 3), (0, 3)]


def excited(stage: int, *, full: bool) -> StagedForCausalLM:
    """As if trained: norms and biases are not 1 and 0, time vectors not 0; the graph is as a stage starts with it."""
    torch.manual_seed(stage)
    model = tiny(stage, full=full, openness=1.0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("full", [False, True], ids=["simple", "full"])
@pytest.mark.parametrize(("stage", "later"), WAYS, ids=[f"{stage}_to_{later}" for stage, later in WAYS])
class TestSwitch:
    def test_moves_no_logit_by_more_than_the_tolerance(self, stage: int, later: int, full: bool) -> None:
        model = excited(stage, full=full)
        assert jump(model, at_stage(model, later), probe(model)) <= TOLERANCE

    def test_is_a_matter_of_loading(self, stage: int, later: int, full: bool, tmp_path: Path) -> None:
        model = excited(stage, full=full)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, stage=later)
        assert loaded.config.stage == later
        assert jump(model, loaded, probe(model)) <= TOLERANCE


def test_a_jump_is_seen() -> None:
    model = excited(0, full=False)
    later = at_stage(model, 1)
    assert later.model.embedding.time is not None
    later.model.embedding.time.weight.data += 0.1
    assert jump(model, later, probe(model)) > 100 * TOLERANCE


def test_new_parts_are_learnt() -> None:
    """What starts at nothing gets a gradient from the first step, and moves the logits once it has moved."""
    model = at_stage(excited(0, full=False), 1).train()
    ids = probe(model)
    model(ids, labels=ids).loss.backward()
    time: Any = model.model.embedding.time
    assert time.weight.grad.abs().max() > 0


def test_a_later_stage_keeps_what_was_learnt() -> None:
    model = excited(1, full=True)
    later = at_stage(model, 3)
    assert {name: tuple(p.shape) for name, p in later.named_parameters()} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }
    for name, parameter in model.named_parameters():
        assert torch.equal(later.get_parameter(name), parameter), name


def test_there_is_no_way_back() -> None:
    with pytest.raises(ValueError, match="no way back to stage 1"):
        at_stage(tiny(2), 1)


@pytest.mark.parametrize("words", [70, 50])
def test_resizing_keeps_states_and_time_vectors_together(words: int) -> None:
    model = excited(1, full=False)
    ids = probe(model).clamp(max=49)
    before = model(ids).logits
    model.resize_token_embeddings(words)
    time: Any = model.model.embedding.time
    assert time.weight.shape == (words, model.config.time_dim)
    torch.testing.assert_close(model(ids).logits[..., :50], before[..., :50], atol=1e-5, rtol=1e-4)
    model(torch.full((1, 3), words - 1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stage": 4}, "stage is one of 0, 1, 2, 3"),
        ({"use_full_model": True, "embed_dim": 32}, "a matrix of 64 numbers"),
        ({"time_dim": 15}, "must be even"),
        ({"graph_openness": 1.5}, "graph_openness is a share"),
        ({"graph_probability": 0}, "above 0 and at most 1"),
        ({"graph_probability": 0.001}, "out of reach"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        StagedConfig(**changes)


def test_tied_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        StagedForCausalLM(StagedConfig.sized("tiny", tie_word_embeddings=True))


def test_sizes_are_those_of_the_report() -> None:
    with torch.device("meta"):
        report = StagedForCausalLM(StagedConfig.sized("report", 3, vocab_size=50257))
        small = StagedForCausalLM(StagedConfig.sized("small", 3, vocab_size=1024))
    assert sum(p.numel() for p in report.parameters()) == pytest.approx(160e6, rel=0.01)
    assert 1e6 < sum(p.numel() for p in small.parameters()) < 5e6
    for full in (False, True):
        assert sum(p.numel() for p in tiny(3, full=full).parameters()) < 100_000


@functools.cache
def sentence() -> dict[str, Tensor]:
    rows, _ = encode([Example("One", " " + sentences(1)[0], None, "")], tokenizer(), 64)
    return PadRight(0)([{"input_ids": rows[0]["input_ids"], "labels": list(rows[0]["input_ids"])}])


@pytest.mark.parametrize(
    ("stage", "full"),
    [
        pytest.param(
            stage, full, id=f"{stage}-{'full' if full else 'simple'}",
            marks=[] if full == bool(stage % 2) else [pytest.mark.slow],
        )
        for stage in range(4)
        for full in (False, True)
    ],
)  # fmt: skip
def test_memorises_a_sentence_in_100_steps(stage: int, full: bool, tmp_path: Path) -> None:
    """As it is trained: K-1 from stage 2 on, the graph closing at stage 3. Loss below 0.1, and greedy says it back."""
    set_seed(0)
    model = tiny(stage, full=full, openness=1.0, vocab_size=len(tokenizer())).train()
    callbacks: list[Any] = [HierarchicalCredit()] if stage >= 2 else []
    callbacks += [GraphClosing(50)] if stage == 3 else []
    rows = [{name: value[0].tolist() for name, value in sentence().items() if name != "attention_mask"}] * 100
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path), max_steps=100, per_device_train_batch_size=1, learning_rate=3e-3, report_to=[],
            max_grad_norm=0.0 if stage >= 2 else 1.0, save_strategy="no", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=rows,
        data_collator=PadRight(0),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()
    assert model.config.graph_openness == (0 if stage == 3 else 1)
    ids = sentence()["input_ids"]
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < 0.1
    written = model.generate(ids[:, :2], max_new_tokens=ids.shape[1] - 2, do_sample=False, eos_token_id=None)
    assert torch.equal(written, ids)
