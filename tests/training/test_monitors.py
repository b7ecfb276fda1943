"""Monitors name a fault while it happens, in a Trainer and in a hand-written loop, and keep still on sound runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.subjects import build
from fixtures.subjects.plain import PlainConfig, PlainGPT
from lmconform import monitors
from lmconform.monitors.replicas import fingerprints
from lmconform.monitors.samples import sample_figures
from lmconform.recipe import Recipe

EOS, PAD, VOCAB = 3, 0, 67
SMALL = PlainConfig(layers=2, width=32, hidden=64)


def sentences(rows: int, seed: int) -> list[list[int]]:
    """Sentences of a rule (each token follows from the last, with some noise), ended by EOS, 6 to 20 tokens long."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(rows):
        length = int(torch.randint(6, 21, (), generator=generator))
        noise = torch.randint(0, 3, (length,), generator=generator).tolist()
        row = [10 + int(torch.randint(0, 50, (), generator=generator))]
        for step in range(1, length - 1):
            row.append(10 + (row[-1] * 3 + noise[step]) % 50)
        made.append([*row, EOS])
    return made


def batch(rows: list[list[int]], *, polluted: bool = False) -> dict[str, Tensor]:
    """Right-padded; `polluted` labels say EOS wherever there is padding, as report 004's did."""
    width = 24
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = (torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]).long()
    labels = torch.where(mask.bool(), ids, EOS if polluted else -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loop(
    model: nn.Module,
    watching: Any,
    steps: int,
    *,
    rate: float = 3e-3,
    polluted: bool = False,
    schedule: Callable[[int], float] | None = None,
    per_epoch: bool = False,
    before: Callable[[int, nn.Module], None] | None = None,
) -> Iterator[monitors.Alert]:
    """A loop written by hand."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule or (lambda step: 1.0))
    for step in range(steps):
        inputs = batch(sentences(8, step), polluted=polluted)
        output = model.train()(**inputs)
        optimizer.zero_grad()
        output.loss.backward()
        if before is not None:
            before(step, model)
        yield from watching.step(
            model=model, optimizer=optimizer, scheduler=scheduler, loss=output.loss.detach(),
            logits=output.logits.detach(), total=steps, **inputs,
        )  # fmt: skip
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if not per_epoch or step % 50 == 49:
            scheduler.step()


def small(seed: int = 0) -> PlainGPT:
    torch.manual_seed(seed)
    return PlainGPT(SMALL)


def causes(found: Any) -> list[str]:
    return [alert.cause for alert in found]


def test_a_sound_run_raises_nothing() -> None:
    watching = monitors.standard(eos_token_id=EOS)
    assert [str(alert) for alert in loop(small(), watching, 200)] == []
    last = watching[0].observations[-1]
    assert last["eos_share"] < 2 * last["corpus_eos_share"]
    assert last["coverage"] > 0.5 * last["corpus_coverage"]


@pytest.mark.parametrize("warm", [10, 100])
def test_a_sound_warm_up_raises_nothing(warm: int) -> None:
    watching = monitors.standard(eos_token_id=EOS)
    found = loop(small(1), watching, 120, schedule=lambda step: min(1.0, (step + 1) / warm))
    assert [str(alert) for alert in found] == []


def test_polluted_labels_are_named_within_200_steps() -> None:
    found = list(loop(small(), monitors.CollapseMonitor(eos_token_id=EOS), 100, polluted=True))
    assert causes(found) == ["data.eos_pollution", "collapse.eos"]
    assert found[0].step == 1
    assert "of the labels that count are EOS" in found[0].message
    assert "its labels ask for" in found[1].message


def test_an_eos_weight_is_named_though_the_labels_are_sound() -> None:
    model = small()
    weight = torch.ones(VOCAB)
    weight[EOS] = 30.0
    model.loss = (
        lambda logits, labels: nn.functional.cross_entropy(  # type: ignore[method-assign]
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight=weight
        )
    )
    found = list(loop(model, monitors.CollapseMonitor(eos_token_id=EOS), 120, rate=1e-3))
    assert "collapse.eos" in causes(found)
    assert "data.eos_pollution" not in causes(found)


def test_a_body_that_learns_nothing_is_stuck_on_one_token() -> None:
    model = small()
    with torch.no_grad():
        model.head.weight.zero_()
    model.head.bias = nn.Parameter(torch.zeros(VOCAB))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.head.bias)
    found = list(loop(model, monitors.CollapseMonitor(eos_token_id=EOS), 180, rate=1e-2))
    assert causes(found) == ["collapse.eos"]  # the most frequent token of these short sentences
    assert "EOS is the likeliest at 100%" in found[0].message


def test_a_sharpening_loss_collapses_onto_one_token() -> None:
    model = small()
    plain = model.loss

    def sharpened(logits: Tensor, labels: Tensor) -> Tensor:
        mean = logits.softmax(-1).mean((0, 1))
        return plain(logits, labels) - 20 * (mean * mean.log()).sum()  # the diversity term's sign is wrong

    model.loss = sharpened  # type: ignore[method-assign]
    found = list(loop(model, monitors.CollapseMonitor(eos_token_id=EOS), 150))
    assert causes(found) == ["collapse.single_token"]


def test_a_detached_block_has_no_gradient() -> None:
    model = small()

    def cut(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output[0].detach() + 0 * output[0], output[1]

    model.blocks[0].register_forward_hook(cut)
    found = list(loop(model, monitors.GradientMonitor(), 40))
    assert causes(found) == ["grad.vanishing"]
    assert found[0].evidence["layer"] in ("blocks.0", "embedding")


def test_exploding_gradients_are_named_before_clipping_hides_them() -> None:
    def blow(step: int, model: nn.Module) -> None:
        if step >= 60:
            for parameter in model.parameters():
                parameter.grad *= 1e4

    assert causes(loop(small(), monitors.GradientMonitor(every=5), 90, before=blow)) == ["grad.exploding"]

    def overflow(step: int, model: nn.Module) -> None:
        if step == 9:
            model.head.weight.grad[0, 0] = float("nan")

    found = list(loop(small(), monitors.GradientMonitor(every=5), 10, before=overflow))
    assert causes(found) == ["grad.exploding"]
    assert found[0].evidence["layer"] == "head"


@pytest.mark.parametrize("spoilt", ["loss", "logits"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_is_said_at_the_first_look(spoilt: str, value: float) -> None:
    inputs = batch(sentences(8, 0))
    seen = {"loss": torch.tensor(2.0), "logits": torch.randn(8, 24, VOCAB)}
    watching = monitors.CollapseMonitor(eos_token_id=EOS)
    assert watching.step(**seen, **inputs) == []
    seen[spoilt] = seen[spoilt] + value
    found = [alert for _ in range(30) for alert in watching.step(**seen, **inputs)]
    assert [(alert.step, alert.cause) for alert in found] == [(10, "grad.exploding")]


@pytest.mark.parametrize(("rate", "cause"), [(1e-9, "lr.too_small"), (1e-6, "lr.too_small"), (0.3, "lr.too_large")])
def test_rates_out_of_all_measure(rate: float, cause: str) -> None:
    assert causes(loop(small(), monitors.UpdateMonitor(), 100, rate=rate)) == [cause]


def noam(step: int, warm: int = 400, width: int = 32) -> float:
    return width**-0.5 * min((step + 1) ** -0.5, (step + 1) * warm**-1.5)


def test_noam_stepped_per_epoch_is_called_that() -> None:
    found = list(loop(small(), monitors.EffectiveRateMonitor(), 150, schedule=noam, per_epoch=True))
    assert causes(found) == ["lr.schedule_per_epoch"]
    assert "has been stepped 0 times in" in found[0].message
    assert causes(loop(small(), monitors.EffectiveRateMonitor(), 150, schedule=noam)) == []


def test_a_schedule_that_is_meant_per_epoch_is_left_alone() -> None:
    watching = monitors.EffectiveRateMonitor(interval="epoch")
    assert causes(loop(small(), watching, 120, schedule=lambda epoch: 0.9**epoch, per_epoch=True)) == []


def test_the_rate_is_compared_with_the_recipe() -> None:
    def half(step: float) -> float:
        return 0.5

    for rate, expected in ((3e-3, ["lr.not_applied"]), (0.1, ["lr.too_small"]), (1e-4, ["lr.too_large"]), (6e-3, [])):
        recipe = Recipe(learning_rate=rate, schedule=half)
        assert causes(loop(small(), monitors.EffectiveRateMonitor(recipe=recipe), 30)) == expected
    with pytest.raises(ValueError, match="give learning_rate"):
        monitors.EffectiveRateMonitor(schedule=half)


def test_sample_figures() -> None:
    varied = sample_figures([[1, 2, 3, 4, 5, 6, 7], [8, 9, 1, 3, 5, 7, 2]])
    assert varied == {"empty": 0, "distinct_1": 9 / 14, "distinct_2": 1, "repetition": 0}
    assert sample_figures([[5] * 12])["repetition"] == pytest.approx(1 - 1 / 9)
    assert sample_figures([[5], []]) == {"empty": 0.5, "distinct_1": 1, "distinct_2": None, "repetition": None}
    assert sample_figures([])["empty"] is None


@pytest.mark.parametrize(
    ("rows", "cause"),
    [([[4, 4, 4, 4, 4, 4, 4, 4, 4]], "collapse.single_token"), ([[], [5, 6], []], "collapse.eos")],
    ids=["repeating", "empty"],
)
def test_samples_of_a_loop(rows: list[list[int]], cause: str) -> None:
    watching = monitors.SampleMonitor(patience=5, every=1)
    found = [alert for _ in range(12) for alert in watching.step(samples=rows)]
    assert causes(found) == [cause]


def test_varied_samples_raise_nothing() -> None:
    watching = monitors.SampleMonitor(patience=5, every=1)
    assert [alert for _ in range(12) for alert in watching.step(samples=[[4, 5, 6, 7, 8], [9, 4, 6]])] == []


def test_fingerprints_see_one_bit() -> None:
    weight = torch.randn(50, 7)
    other = weight.clone()
    other[3, 3] = torch.nextafter(other[3, 3], torch.tensor(9.0))
    flags = torch.tensor([True, False])
    before, after = fingerprints([weight, weight.bfloat16(), flags]), fingerprints([other, weight.bfloat16(), flags])
    assert (before != after).tolist() == [True, False, False]


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "monitors.jsonl"
    watching = monitors.standard(eos_token_id=EOS, log=str(file))
    found = list(loop(small(), watching, 30, polluted=True))
    watching.flush()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["monitor"] for line in lines} >= {"CollapseMonitor", "GradientMonitor", "UpdateMonitor"}
    written = [line["alert"]["cause"] for line in lines if "alert" in line]
    assert written == [alert.cause for alert in found]
    assert all(line["top_share"] <= 1 for line in lines if "top_share" in line)


def test_misuse_is_refused() -> None:
    with pytest.raises(TypeError, match="logit"):
        monitors.CollapseMonitor().step(logit=None)
    with pytest.raises(ValueError, match="at least 1"):
        monitors.GradientMonitor(every=0)


# -- transformers.Trainer --------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, polluted: bool) -> None:
        self.inputs = batch(sentences(256, 1), polluted=polluted)

    def __len__(self) -> int:
        return len(self.inputs["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.inputs.items()}


def trainer(folder: Path, watching: Any, *, polluted: bool = False, host: str = "llama", **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 10, **arguments,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **settings)
    return Trainer(build(host), args, train_dataset=Rows(polluted), callbacks=list(watching))


def test_trainer_sound(tmp_path: Path) -> None:
    watching = monitors.standard(eos_token_id=EOS, log=str(tmp_path / "log.jsonl"))
    trainer(tmp_path, watching, lr_scheduler_type="cosine", warmup_steps=20).train()
    assert [str(alert) for alert in watching.alerts] == []
    collapse, gradients, updates, rates, _, samples = watching
    assert [seen["step"] for seen in collapse.observations] == [1, 10, 20, 30, 40, 50, 60]
    assert any(name.startswith("model.layers.") for name in gradients.observations[0]["layers"])
    assert all(0 < ratio < 1 for ratio in updates.observations[1]["layers"].values())  # at step 1 the rate is 0
    assert rates.observations[0]["promised"] == 0
    assert samples.observations == []
    assert (tmp_path / "log.jsonl").read_text().count("\n") > 20


def test_trainer_is_stopped_when_its_labels_are_polluted(tmp_path: Path) -> None:
    watching = monitors.Monitors([monitors.CollapseMonitor(eos_token_id=EOS, stop=True)])
    run = trainer(tmp_path, watching, polluted=True)
    run.train()
    assert causes(watching.alerts) == ["data.eos_pollution"]
    assert run.state.global_step == 1
    assert watching.stopped


def test_trainer_names_the_collapse(tmp_path: Path) -> None:
    watching = monitors.Monitors([monitors.CollapseMonitor(eos_token_id=EOS)])
    trainer(tmp_path, watching, polluted=True, host="gpt2").train()
    assert "collapse.eos" in causes(watching.alerts)


def test_trainer_gradients_are_seen_before_clipping(tmp_path: Path) -> None:
    watching = monitors.GradientMonitor(every=2)
    run = trainer(tmp_path, [watching], max_steps=4, max_grad_norm=1e-3, gradient_accumulation_steps=2)
    run.train()
    logged = run.state.log_history
    assert all(seen["total"] > 0.01 for seen in watching.observations), logged


def test_trainer_with_a_dead_schedule(tmp_path: Path) -> None:
    watching = monitors.EffectiveRateMonitor()
    run = trainer(tmp_path, [watching], max_steps=70)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-4)

    class PerEpoch(torch.optim.lr_scheduler.LambdaLR):
        def step(self, epoch: int | None = None) -> None:
            self.calls = getattr(self, "calls", -1) + 1
            if self.calls % 32 == 0:
                super().step()

    run.optimizers = run.optimizer, run.lr_scheduler = optimizer, PerEpoch(optimizer, noam)
    run.train()
    assert causes(watching.alerts) == ["lr.schedule_per_epoch"]


def test_trainer_draws_samples_without_disturbing_the_run(tmp_path: Path) -> None:
    """Prompts that end in EOS give nothing, and that is named; the run ends as one without the monitor does."""
    sample = monitors.generated([[5, 6, EOS], [7, EOS]], max_new_tokens=6, pad_token_id=PAD, eos_token_id=EOS)
    watching = monitors.SampleMonitor(sample, every=10)
    weights = []
    for callbacks in ([watching], []):
        torch.manual_seed(0)
        run = trainer(tmp_path, callbacks, polluted=True)
        run.train()
        weights.append(run.model.lm_head.weight.detach())
    assert torch.equal(*weights)
    assert [seen["step"] for seen in watching.observations] == [1, 10, 20, 30, 40, 50, 60]
    assert causes(watching.alerts) == ["collapse.eos"]


def test_samples_need_prompts() -> None:
    for prompts in ([], [[]]):
        with pytest.raises(ValueError, match="at least one token"):
            monitors.generated(prompts, max_new_tokens=4, pad_token_id=PAD, eos_token_id=EOS)
