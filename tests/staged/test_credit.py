"""K-1: who gets how much, and that it stands between backward and clipping, accumulated or not."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from models.staged.credit import HierarchicalCredit, parts, share_out, shares, staged, tree
from models.staged.system import tiny
from models.training.data import PadRight

LEAVES = ["embedding", "projector", "operator 0", "operator 1", "head"]
NAMES = ["a", "b", "c", "d"]


def test_the_tree_halves_neighbouring_layers() -> None:
    assert tree(LEAVES) == ((("embedding", "projector"), "operator 0"), ("operator 1", "head"))


def test_leaves_are_the_layers_and_hold_every_parameter_once() -> None:
    model = tiny(2)
    found = parts(model)
    assert list(found) == ["embedding", "MU", "projector", "operator 0", "operator 1", "head"]
    held = [id(parameter) for part in found.values() for parameter in part.parameters()]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_equal_layers_keep_their_gradients() -> None:
    assert shares(tree(NAMES), dict.fromkeys(NAMES, 3.0)) == pytest.approx(dict.fromkeys(NAMES, 1.0))


def test_each_node_takes_its_share() -> None:
    """By hand: norms 3, 4 | 5, 5 give nodes 5 | 7.07; shares 0.414, 0.586, and below 3/7, 4/7 | 1/2, 1/2."""
    left, right = 5 / (5 + math.sqrt(50)), math.sqrt(50) / (5 + math.sqrt(50))
    expected = dict(zip(NAMES, (4 * left * 3 / 7, 4 * left * 4 / 7, 2 * right, 2 * right)))
    assert shares(tree(NAMES), dict(zip(NAMES, (3.0, 4.0, 5.0, 5.0)))) == pytest.approx(expected)


def grouped(*values: float) -> dict[str, list[nn.Parameter]]:
    """One parameter a group, of that gradient."""
    groups = {name: [nn.Parameter(torch.zeros(2))] for name in NAMES}
    for group, value in zip(groups.values(), values):
        group[0].grad = torch.full((2,), value)
    return groups


def whole(groups: dict[str, list[nn.Parameter]]) -> float:
    return math.hypot(*(float(p.grad.norm()) for group in groups.values() for p in group if p.grad is not None))


def test_the_whole_gradient_keeps_its_norm() -> None:
    groups = grouped(1.0, 2.0, 3.0, 2.5)
    before = whole(groups)
    credit = share_out(groups, 0.01)
    assert credit is not None
    assert max(credit.factors.values()) > 1.1 > 0.9 > min(credit.factors.values())
    assert whole(groups) == pytest.approx(before)


def test_nothing_is_scaled_to_zero() -> None:
    credit = share_out(grouped(1e-9, 1.0, 100.0), 0.1)
    assert credit is not None
    assert min(credit.factors.values()) == 0.1


def test_credit_is_a_running_mean() -> None:
    """The shares are those of what was earned, a tenth of it now; so a part that is loud once is not heard at once."""
    first = share_out(grouped(1.0, 1.0, 1.0, 1.0), 0.01)
    assert first is not None
    second = share_out(grouped(1.0, 1.0, 1.0, 11.0), 0.01, first.earned, memory=0.9)
    assert second is not None
    norm = math.sqrt(2)
    assert second.earned == pytest.approx(dict(zip(NAMES, (norm, norm, norm, 2 * norm))))
    alone = share_out(grouped(1.0, 1.0, 1.0, 11.0), 0.01)
    assert alone is not None
    assert alone.factors["a"] < second.factors["a"] / 2


def test_scales_in_place_what_has_a_gradient() -> None:
    groups = grouped(1.0, 2.0, 3.0)  # d has none
    credit = share_out(groups, 0.1)
    assert credit is not None
    assert credit.silent == ["d"]
    for name, value in zip(NAMES, (1.0, 2.0, 3.0)):
        torch.testing.assert_close(groups[name][0].grad, torch.full((2,), value * credit.factors[name]))
    assert groups["d"][0].grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_leaves_a_gradient_alone_that_is_not_finite(value: float) -> None:
    groups = grouped(1.0, value, 3.0, 1.0)
    assert share_out(groups, 0.1) is None
    assert groups["a"][0].grad is not None
    assert groups["a"][0].grad.tolist() == [1.0, 1.0]


class Kept(TrainerCallback):
    """The gradients of every optimizer step, and the weights behind it."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients.append(
            {name: p.grad.clone() for name, p in kwargs["model"].named_parameters() if p.grad is not None}
        )


def run(folder: Path, *, accumulation: int, max_norm: float = 1.0, steps: int = 3, credit: bool = True) -> Any:
    """Gradients before and after K-1 at every step, on 12 rows a step; and the credit callback."""
    set_seed(0)
    model = tiny(2, full=True).train()
    rows = torch.randint(4, 64, (12 * steps, 16), generator=torch.Generator().manual_seed(0)).tolist()
    before, after, k1 = Kept("before"), Kept("after"), HierarchicalCredit(max_norm=max_norm)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=12 // accumulation, max_grad_norm=0.0,
            gradient_accumulation_steps=accumulation, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        data_collator=PadRight(0),
        callbacks=[before, *([k1] if credit else []), after],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return before.gradients, after.gradients, k1, trainer.model


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return math.hypot(*(float(gradient.norm()) for gradient in gradients.values()))


class TestInTheTrainer:
    def test_scales_accumulated_gradients_once_a_step(self, tmp_path: Path) -> None:
        """Three micro-batches of four rows give the gradients, the factors and the weights of one batch of twelve."""
        whole = run(tmp_path, accumulation=1)
        micro = run(tmp_path, accumulation=3)
        assert len(whole[1]) == len(micro[1]) == 3
        for one, other in zip(whole[1], micro[1]):
            for name in one:
                torch.testing.assert_close(other[name], one[name], atol=1e-6, rtol=1e-3)
        assert micro[2].last.factors == pytest.approx(whole[2].last.factors, rel=1e-3)

    def test_clips_behind_the_scaling(self, tmp_path: Path) -> None:
        free = run(tmp_path, accumulation=1, max_norm=0.0, steps=1)
        bound = norm(free[1][0]) / 3
        clipped = run(tmp_path, accumulation=1, max_norm=bound, steps=1)
        assert norm(clipped[1][0]) == pytest.approx(bound, rel=1e-4)
        for name, gradient in free[1][0].items():
            torch.testing.assert_close(clipped[1][0][name], gradient / 3, atol=1e-7, rtol=1e-3)

    def test_scales_each_layer_by_its_factor(self, tmp_path: Path) -> None:
        before, after, k1, model = run(tmp_path, accumulation=1, max_norm=0.0, steps=1)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert len({round(factor, 3) for factor in k1.last.factors.values()}) > 2
        for part, module in parts(model).items():
            for parameter in module.parameters():
                name = names[id(parameter)]
                torch.testing.assert_close(after[0][name], before[0][name] * k1.last.factors[part])

    def test_off_and_on_see_the_same_data_and_end_elsewhere(self, tmp_path: Path) -> None:
        on, off = (run(tmp_path, accumulation=2, credit=credit) for credit in (True, False))
        for name in on[0][0]:
            assert torch.equal(on[0][0][name], off[0][0][name])
        assert not torch.equal(on[3].head.weight, off[3].head.weight)

    def test_refuses_a_trainer_that_clips_first(self, tmp_path: Path) -> None:
        model = tiny(2).train()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True),
            train_dataset=[{"input_ids": [4, 5], "labels": [4, 5]}],
            data_collator=PadRight(0),
            callbacks=[HierarchicalCredit()],
        )
        with pytest.raises(ValueError, match=r"clips .*before K-1"):
            trainer.train()


def test_credit_survives_a_resumed_run(tmp_path: Path) -> None:
    """The same credit in the last step of one run, and of one that was stopped after two steps and resumed."""
    rows = torch.randint(4, 64, (48, 16), generator=torch.Generator().manual_seed(0)).tolist()

    def go(folder: Path, steps: int, *, resume: bool = False) -> HierarchicalCredit:
        set_seed(0)
        k1 = HierarchicalCredit()
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=12, max_grad_norm=0.0, report_to=[],
            save_steps=2, disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(
            model=tiny(2).train(),
            args=arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            data_collator=PadRight(0),
            callbacks=[k1],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
        return k1

    straight = go(tmp_path / "straight", 4)
    go(tmp_path / "stopped", 2)
    resumed = go(tmp_path / "stopped", 4, resume=True)
    assert straight.last is not None
    assert resumed.last is not None
    assert resumed.last.earned == pytest.approx(straight.last.earned, rel=1e-5)


def test_says_which_layer_gets_no_gradient(capsys: Any) -> None:
    model = tiny(2).train()
    k1 = HierarchicalCredit()
    begin(k1, model)
    ids = torch.randint(4, 64, (2, 8))
    model(ids, labels=ids).loss.backward()
    for parameter in model.model.projector.parameters():
        parameter.grad = None
    k1.on_pre_optimizer_step(None, SimpleNamespace(global_step=7), None)
    k1.on_pre_optimizer_step(None, SimpleNamespace(global_step=8), None)
    assert capsys.readouterr().out == "K-1: no gradient at all in projector at step 7\n"
    assert k1.warned == {"projector"}


def test_unscales_half_precision_gradients_before_it_clips() -> None:
    """As the Trainer's own clipping would: a loss scale of 1024 must not look like a gradient 1024 times as long."""
    model = tiny(2).train()
    k1 = HierarchicalCredit(max_norm=1e6)
    begin(k1, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ids = torch.randint(4, 64, (2, 8))
    loss = model(ids, labels=ids).loss
    expected = torch.autograd.grad(loss, model.head.weight, retain_graph=True)[0]
    scaler.scale(loss).backward()
    k1.on_pre_optimizer_step(
        None, SimpleNamespace(global_step=0), None, optimizer=SimpleNamespace(scaler=scaler, optimizer=optimizer)
    )
    assert k1.last is not None
    torch.testing.assert_close(model.head.weight.grad, expected * k1.last.factors["head"])
    scaler.step(optimizer)  # knows that they are unscaled


def test_shares_a_lora_adapter_out_by_layers() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(2), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    k1 = HierarchicalCredit()
    begin(k1, model)
    ids = torch.randint(4, 64, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    k1.on_pre_optimizer_step(None, SimpleNamespace(global_step=0), None)
    assert k1.last is not None
    assert {"MU", "projector", "operator 0", "operator 1"} <= set(k1.last.norms)


def begin(k1: HierarchicalCredit, model: nn.Module) -> None:
    arguments = SimpleNamespace(max_grad_norm=0.0, output_dir="nowhere")
    k1.on_train_begin(arguments, SimpleNamespace(global_step=0), None, model=model)


@pytest.mark.parametrize(("name", "value"), [("floor", 0.0), ("max_norm", -1.0), ("memory", 1.0)])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        HierarchicalCredit(**{name: value})


def test_other_models_are_refused() -> None:
    sizes: dict[str, int] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    other = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    with pytest.raises(TypeError, match="no StagedForCausalLM"):
        staged(other)
