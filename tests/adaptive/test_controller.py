"""The head controller: what it measures, what it closes and opens, and that the loss survives it."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from fixtures.tokenizers import sentences, word_level
from models.adaptive import AdaptiveForCausalLM
from models.adaptive.controller import HeadController, gated, measure_heads
from models.adaptive.system import tiny
from models.training.data import PadRight

pytestmark = pytest.mark.adaptive

STEPS, ROWS = 160, 256


@functools.cache
def corpus() -> list[dict[str, list[int]]]:
    """Sentences whose last part names their first subject again: no head can be spared that carries it over."""
    texts = []
    for sentence in sentences(ROWS + 64):
        words = sentence.split()
        texts.append(" ".join([*words[:-1], "and", "the", words[3 - 1], "went", "home", "."]))
    return [{"input_ids": ids, "labels": list(ids)} for ids in word_level(ends=True)(texts)["input_ids"]]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return PadRight(0)(corpus()[:6])


@pytest.fixture
def model() -> AdaptiveForCausalLM:
    torch.manual_seed(0)
    made = tiny()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        made.gates.fill_(1)
    return made


def train(folder: Path, callbacks: list[Any], steps: int = STEPS) -> tuple[AdaptiveForCausalLM, float]:
    """The same run with and without callbacks; the model, and its validation loss."""
    set_seed(0)
    model = tiny().train()
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-3, warmup_steps=10,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=corpus()[:ROWS], eval_dataset=corpus()[ROWS:], data_collator=PadRight(0),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model, trainer.evaluate()["eval_loss"]


def test_training_under_control_ends_with_fewer_heads_at_the_same_loss(tmp_path: Path) -> None:
    _, free = train(tmp_path, [])
    probe = [PadRight(0)(corpus()[:32])]
    controller = HeadController(probe, warmup_steps=STEPS // 2, every=STEPS // 8, max_share=0.5, l1=0.5)
    model, controlled = train(tmp_path, [controller])
    closed = len(model.closed_heads())
    print(f"validation loss {free:.4f} free, {controlled:.4f} under control with {closed} of 16 heads closed")
    assert 0 < closed <= 8
    assert controlled <= 1.02 * free
    removed = model.prune_heads()
    assert sum(map(len, removed.values())) == closed
    left = sum(len(model.config.heads_of(layer)) for layer in range(4))
    assert left == 16 - closed


class TestMeasures:
    def test_entropy_is_that_of_the_written_out_attention(self, model: AdaptiveForCausalLM, batch: Any) -> None:
        found = measure_heads(model, [batch])
        model.set_attn_implementation("eager")
        attentions = model(**batch, output_attentions=True).attentions
        mask = batch["attention_mask"].bool()
        for layer, weights in enumerate(attentions):
            each = torch.special.entr(weights.double()).sum(-1)  # [batch, head, query]
            expected = torch.stack([each[:, head][mask].mean() for head in range(4)])
            torch.testing.assert_close(found.entropy[layer], expected)

    def test_uniform_attention_has_uniformity_one(self, model: AdaptiveForCausalLM, batch: Any) -> None:
        attn = model.transformer.h[2].attn
        attn.c_attn.weight.data[:, 8:16] = attn.c_attn.bias.data[8:16] = 0  # queries of head 1
        found = measure_heads(model, [batch])
        assert found.uniformity[2, 1] == pytest.approx(1)
        lengths = batch["attention_mask"].sum(-1).tolist()
        visible = [math.log(place + 1) for length in lengths for place in range(length)]
        assert found.entropy[2, 1] == pytest.approx(sum(visible) / len(visible))
        assert (found.uniformity <= 1 + 1e-6).all()  # float32 weights sum to 1 no better

    def test_importance_is_the_rise_of_the_loss(self, model: AdaptiveForCausalLM, batch: Any) -> None:
        found = measure_heads(model, [batch])
        whole = model(**batch).loss.item()
        model.gates.data[3, 2] = 0
        assert found.importance[3, 2] == pytest.approx(model(**batch).loss.item() - whole, abs=1e-6)
        closed = measure_heads(model, [batch])  # and of a closed head, the rise over having it open
        assert closed.importance[3, 2] == pytest.approx(float(found.importance[3, 2]), abs=1e-6)

    def test_gradient_norm_is_that_of_the_heads_weights(self, model: AdaptiveForCausalLM, batch: Any) -> None:
        found = measure_heads(model, [batch])
        model(**batch).loss.backward()
        attn = model.transformer.h[1].attn
        fused = attn.c_attn.weight.grad.unflatten(1, (3, 4, 8))[:, :, 2]
        rows = attn.c_proj.weight.grad.unflatten(0, (4, 8))[2]
        expected = math.sqrt(float(fused.square().sum() + rows.square().sum()))
        assert found.gradient_norm[1, 2] == pytest.approx(expected, rel=1e-4)

    def test_leave_the_model_as_it_was(self, model: AdaptiveForCausalLM, batch: Any) -> None:
        model.train().requires_grad_(False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        measure_heads(model, [batch])
        assert model.training
        assert model.config._attn_implementation == "sdpa"
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)

    def test_padding_does_not_count(self, model: AdaptiveForCausalLM, batch: Any) -> None:
        wider = {
            name: torch.nn.functional.pad(value, (0, 7), value=-100 if name == "labels" else 0)
            for name, value in batch.items()
        }
        one, other = measure_heads(model, [batch]), measure_heads(model, [wider])
        for name in ("entropy", "uniformity", "gradient_norm", "importance"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-6)

    def test_heads_that_are_gone_hold_nothing(self, model: AdaptiveForCausalLM, batch: Any) -> None:
        whole = measure_heads(model, [batch])
        model.prune_heads({0: [1]})
        found = measure_heads(model, [batch])
        assert found.importance[0, 1] == found.gradient_norm[0, 1] == found.entropy[0, 1] == 0
        torch.testing.assert_close(found.entropy[0, [0, 2, 3]], whole.entropy[0, [0, 2, 3]])


class TestDecisions:
    def test_an_idle_head_is_closed(self, model: AdaptiveForCausalLM, batch: Any) -> None:
        attn = model.transformer.h[1].attn  # head 3: no value, nothing read from it
        attn.c_attn.weight.data[:, 64 + 24 :] = attn.c_attn.bias.data[64 + 24 :] = 0
        attn.c_proj.weight.data[24:] = 0
        record = HeadController([batch], near_uniform=1.0).look(model, 1)
        assert record["newly_closed"] == [(1, 3)]
        assert record["loss"] == pytest.approx(record["loss_before"])

    def test_a_head_that_matters_stays_though_it_is_uniform(self, model: AdaptiveForCausalLM, batch: Any) -> None:
        attn = model.transformer.h[2].attn
        attn.c_attn.weight.data[:, 8:16] = attn.c_attn.bias.data[8:16] = 0
        uniform = functools.partial(HeadController, [batch], near_uniform=0.999, idle=0.0)
        importance = float(measure_heads(model, [batch]).importance[2, 1])
        loss = model(**batch).loss.item()
        assert uniform(budget=abs(importance) / loss * 2).look(model, 1)["closed"] == [(2, 1)]
        model.gates.data.fill_(1)
        if importance > 0:
            assert uniform(budget=importance / loss / 2).look(model, 1)["closed"] == []

    @pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
    def test_never_more_than_the_share_are_closed(self, model: AdaptiveForCausalLM, batch: Any, share: float) -> None:
        eager = HeadController([batch], near_uniform=0.0, budget=10.0, max_share=share, regrow=10.0)
        for step in range(3):
            eager.look(model, step)
        assert len(model.closed_heads()) == 16 * share

    def test_heads_that_are_gone_count_towards_the_share(self, model: AdaptiveForCausalLM, batch: Any) -> None:
        model.prune_heads({0: [0, 1, 2]})
        HeadController([batch], near_uniform=0.0, budget=10.0, max_share=0.25, regrow=10.0).look(model, 1)
        assert len(model.closed_heads()) == 1

    def test_a_head_is_regrown_when_it_is_missed(self, model: AdaptiveForCausalLM, batch: Any) -> None:
        importance = measure_heads(model, [batch]).importance
        layer, head = divmod(int(importance.argmax()), 4)
        model.gates.data[layer, head] = 0
        loss = model(**batch).loss.item()
        missed = float(importance[layer, head]) / loss
        still = HeadController([batch], near_uniform=1.0, idle=0.0, regrow=missed * 1.1).look(model, 1)
        assert still["opened"] == []
        record = HeadController([batch], near_uniform=1.0, idle=0.0, regrow=missed * 0.9).look(model, 2)
        assert record["opened"] == [(layer, head)]
        assert model.gates[layer, head] == 1
        assert record["loss"] < loss

    def test_heads_are_closed_one_at_a_time_against_the_best_loss_so_far(
        self, model: AdaptiveForCausalLM, batch: Any
    ) -> None:
        """What each head may cost alone, all of them together may not: nor may a gain pay for a loss."""
        importance = measure_heads(model, [batch]).importance
        loss = model(**batch).loss.item()
        budget = float(importance.flatten().sort().values[-2]) / loss * 1.01  # all but one could go, each alone
        record = HeadController([batch], near_uniform=0.0, max_share=1.0, budget=budget).look(model, 1)
        assert 0 < len(record["closed"]) < 15
        gains = float(importance.clamp(max=0).sum())
        assert gains < 0
        assert record["loss"] < loss * (1 + budget)

    def test_the_penalty_is_its_proximal_step(self, model: AdaptiveForCausalLM, batch: Any) -> None:
        model.gates.data[0] = torch.tensor([1.0, -0.5, 0.01, 0.0])
        HeadController([batch], l1=2.0).shrink(model, rate=0.01)
        torch.testing.assert_close(model.gates.data[0], torch.tensor([0.98, -0.48, 0.0, 0.0]))

    def test_a_closed_gate_is_held_against_the_optimizers_momentum(self, tmp_path: Path) -> None:
        probe = [PadRight(0)(corpus()[:8])]
        controller = HeadController(
            probe, warmup_steps=6, every=100, near_uniform=0.0, budget=10.0, max_share=0.25, regrow=10.0
        )
        model, _ = train(tmp_path, [controller], steps=12)
        assert model.closed_heads() == controller.history[0]["closed"]
        assert len(model.closed_heads()) == 4

    def test_prunes_at_the_end_where_asked(self, tmp_path: Path) -> None:
        probe = [PadRight(0)(corpus()[:8])]
        controller = HeadController(
            probe, warmup_steps=2, every=100, near_uniform=0.0, budget=10.0, max_share=0.25, prune=True
        )
        model, _ = train(tmp_path, [controller], steps=3)
        assert sum(len(model.config.heads_of(layer)) for layer in range(4)) == 12


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"probe": []}, "probe is empty"),
        ({"every": 0}, "every=0"),
        ({"max_share": 1.5}, "max_share=1.5 is a share"),
        ({"near_uniform": -1}, "near_uniform=-1 is a share"),
        ({"l1": -1}, "l1=-1 must not be negative"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_settings_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadController(**{"probe": [{}]} | wrong)


def test_refuses_a_model_without_gates() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(TypeError, match="LlamaForCausalLM holds no AdaptiveForCausalLM"):
        gated(LlamaForCausalLM(config))
