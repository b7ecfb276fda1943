"""Sound recipes and tokenizers conform; schedules have their closed forms; a Trainer can be handed over whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fixtures import recipes, tokenizers
from fixtures.subjects import PlainConfig, PlainGPT, build
from lmconform.recipe import Recipe
from lmconform.registry import get_check
from lmconform.results import Result, Status
from lmconform.runner import Runner
from lmconform.schedules import FORMS, ClosedForm
from lmconform.subject import Subject

CHECKS = (
    "loss.smoothing", "training.schedule", "training.optimizer", "training.weight_decay", "training.resume",
    "collapse.labels",
)  # fmt: skip
TOKENIZER = (
    "tokenizer.flags", "tokenizer.round_trip", "tokenizer.specials", "tokenizer.padding", "tokenizer.bounds",
)  # fmt: skip
GREEN = (Status.passed, Status.not_applicable)
SEEDS = range(10)
RUN_BY = {  # the checks that each sound recipe is complete enough for
    "warmed": {"loss.smoothing", "training.schedule", "training.optimizer", "training.resume", "collapse.labels"},
    "cosine_to_the_end": set(CHECKS) - {"loss.smoothing"},
    "noam": {"training.schedule", "training.optimizer", "training.resume"},
    "by_epoch": {"training.schedule", "training.optimizer", "training.resume"},
    "torch_warmup": set(CHECKS) - {"loss.smoothing", "collapse.labels"},
    "packed": {"collapse.labels"},
}


def run(subject: Subject, checks: tuple[str, ...], seed: int = 0, profile: str = "default") -> dict[str, Result]:
    runner = Runner(subject.open(seed=seed), profile=profile, seed=seed)
    results = {id: runner.run(get_check(id)) for id in checks}
    assert {id: result.message for id, result in results.items() if result.status not in GREEN} == {}
    return results


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", recipes.SOUND)
def test_sound_recipe(name: str, seed: int) -> None:
    recipe = recipes.SOUND[name]()
    results = run(Subject(lambda: build("plain", seed), recipe=recipe), CHECKS, seed)
    assert {id for id, result in results.items() if result.status == Status.passed} == RUN_BY[name]


@pytest.mark.parametrize("host", ["gpt2", "llama", "mixtral", "mamba"])
def test_sound_recipe_on_other_hosts(host: str) -> None:
    run(Subject(lambda: build(host, 0), recipe=recipes.warmed()), CHECKS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", tokenizers.SOUND)
def test_sound_tokenizer(name: str, seed: int) -> None:
    results = run(Subject(lambda: build("plain", seed), tokenizer=tokenizers.SOUND[name]()), TOKENIZER, seed)
    assert {result.status for result in results.values()} == {Status.passed}


def test_byte_level_tokenizer() -> None:
    subject = Subject(lambda: PlainGPT(PlainConfig(vocab_size=320)), tokenizer=tokenizers.byte_pairs())
    assert not run(subject, TOKENIZER)["tokenizer.round_trip"].message


def test_missing_parts_are_named() -> None:
    results = run(Subject(lambda: build("plain"), recipe=Recipe()), CHECKS)
    assert {id: result.message for id, result in results.items()} == {
        "loss.smoothing": "the recipe gives no loss(logits, labels)",
        "training.schedule": "the recipe gives no make_scheduler(optimizer, total_steps)",
        "training.optimizer": "the recipe gives no make_optimizer(model)",
        "training.weight_decay": "the recipe gives no make_optimizer(model)",
        "training.resume": "the recipe gives no make_optimizer(model)",
        "collapse.labels": "the recipe gives no batches (or texts and collate)",
    }


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"interval": "week"}, "none of step, epoch, batch"),
        ({"accumulation": 0}, "micro-batches from 1"),
        ({"schedule": "cosin"}, "or give a callable step -> factor"),
        ({"schedule": "noam"}, "needs width and warmup_steps"),
        ({"save": print}, "come together"),
    ],
)
def test_wrong_parts_are_refused(parts: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Recipe(**parts)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt"])
def test_closed_forms_are_those_of_transformers(name: str) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = 0 if name == "constant" else 7
    scheduler = get_scheduler(name, optimizer, warmup, 40)
    form = ClosedForm(name, warmup, 40)
    for step in range(41):  # transformers' cosine rises again behind its end
        assert optimizer.param_groups[0]["lr"] == pytest.approx(form(step), rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_every_form_is_named() -> None:
    assert all(ClosedForm(name, 4, 10, width=8)(3) >= 0 for name in FORMS)


def trainer(folder: Path, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = recipes.collate(recipes.texts(24))
    dataset = [{key: value[index] for key, value in rows.items()} for index in range(24)]
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 5, "report_to": [], "use_cpu": True}
    return Trainer(
        model=build("llama"),
        args=TrainingArguments(output_dir=str(folder), **{**settings, **arguments}),
        train_dataset=dataset,
        processing_class=tokenizers.word_level(),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"warmup_steps": 4, "weight_decay": 0.1, "gradient_accumulation_steps": 2},
        {"lr_scheduler_type": "cosine", "label_smoothing_factor": 0.1, "max_steps": 12},
    ],
    ids=["accumulating", "smoothing"],
)
def test_trainer_is_sound(tmp_path: Path, arguments: dict[str, Any]) -> None:
    recipe = Recipe.from_trainer(trainer(tmp_path, **arguments))
    assert recipe.steps() == (15 if "warmup_steps" in arguments else 12)
    results = run(Subject(lambda: build("llama"), recipe=recipe), CHECKS)
    ran = {id for id, result in results.items() if result.status == Status.passed}
    assert {"training.schedule", "training.optimizer", "training.resume", "collapse.labels"} <= ran
    assert ("loss.smoothing" in ran) == ("label_smoothing_factor" in arguments)


def test_optimizer_given_to_a_trainer_is_audited(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.optimizer = recipes.grouped_adamw(build("llama", 1))  # of another copy of the model
    specimen = Subject(lambda: build("llama"), recipe=Recipe.from_trainer(made)).open()
    result = Runner(specimen).run(get_check("training.optimizer"))
    assert "no parameter of the model" in result.message
    made.optimizer = recipes.grouped_adamw(made.model)
    specimen = Subject(lambda: build("llama"), recipe=Recipe.from_trainer(made)).open()
    assert Runner(specimen).run(get_check("training.optimizer")).status == Status.passed


def test_label_smoothing_of_trainer_on_a_class_of_ones_own(tmp_path: Path) -> None:
    """Trainer shifts labels for smoothing only where it knows the class's name."""
    made = trainer(tmp_path, label_smoothing_factor=0.1)
    made.model.__class__ = type("MyGPT", (type(made.model),), {})
    specimen = Subject(lambda: build("llama"), recipe=Recipe.from_trainer(made)).open()
    result = Runner(specimen).run(get_check("collapse.labels"))
    assert "the loss does not shift them" in result.message


def test_training_arguments_alone(tmp_path: Path) -> None:
    recipe = Recipe.from_training_arguments(trainer(tmp_path, max_steps=30, warmup_steps=6).args)
    results = run(Subject(lambda: build("plain"), recipe=recipe), CHECKS)
    assert results["training.schedule"].status == Status.passed
    assert recipe.schedule == "linear"


def test_resuming_through_trainer_checkpoints() -> None:
    results = run(
        Subject(lambda: build("llama"), recipe=recipes.cosine_to_the_end()), ("training.resume",), profile="thorough"
    )
    assert "not tried" not in results["training.resume"].message


def test_generator_batches_can_be_read_twice() -> None:
    recipe = Recipe(batches=(recipes.collate(recipes.texts(2, first)) for first in range(6)))
    assert len(recipe.read(2)) == 2
    assert len(recipe.read(6)) == 6
    assert recipe.batch_count() is None
