"""training.resume: a run that is interrupted and resumed goes on as if nothing had happened."""

from __future__ import annotations

import io
import random
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.checks.training_optimizer import made_optimizers
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring.saving import poison, pretrained, quiet_transformers
from lmconform.registry import register_check
from lmconform.specimen import Specimen, Unavailable

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.recipe import Batch, Recipe

STEPS, CUT = 5, 3
ROWS, TIME = 2, 12
SAVING = "save and restore model, optimizer, scheduler and the random state (torch, numpy, random) together"


@register_check(
    "training.resume",
    holds="interrupted and resumed (model, optimizer, scheduler, random state) equals uninterrupted, step for step",
    needs=("recipe",),
    requires=("contract.shape", "contract.finite"),
)
def check_resume(subject: Specimen, ctx: Context) -> None:
    """Five steps in one go, and three, a stop, a model built anew under another seed, and the other two.

    By the recipe's own save and load where it has them, else by the state dicts of all parts. Thorough: through the
    checkpoints of transformers' Trainer too, for models of transformers.
    """
    recipe = subject.recipe
    recipe.need("make_optimizer")
    batches = _batches(subject, ctx, recipe)
    with tempfile.TemporaryDirectory(prefix="lmconform-") as folder:
        whole = Training(subject, ctx, recipe, batches, subject.as_loaded().copy())
        whole.seed(ctx.seed)
        whole.run(0, CUT)
        saved = whole.save(folder)
        at_cut = whole.snapshot()
        whole.run(CUT, STEPS)
        resumed = Training(subject, ctx, recipe, batches, _other_weights(subject))
        resumed.seed(ctx.seed + 1)  # a new process has another random state
        resumed.load(folder, saved)
        after_load = resumed.snapshot()
        resumed.run(CUT, STEPS)
    if any(loss != loss for loss in whole.losses):
        ctx.not_applicable("the loss is NaN within five steps of this recipe")
    if not _same(whole, resumed):
        what, hint = _lost(at_cut, after_load)
        again = Training(subject, ctx, recipe, batches, subject.as_loaded().copy())
        again.seed(ctx.seed)
        again.run(0, STEPS)
        _compare(ctx, whole, resumed, again, what, Hint(hint, "training.resume_differs"))
    ctx.within(0.0, tolerance.epsilon(subject.dtype), "the loss after resuming")
    if ctx.profile == "thorough":
        _through_trainer(subject, ctx, recipe, batches)


@dataclass
class Snapshot:
    """What a run consists of at one step, by name."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Any]]  # parameter, then the optimizer's own names
    rates: list[float]
    schedule: Any  # how far the scheduler is, as it tells
    randomness: Tensor


class Training:
    """A few steps of the recipe on one copy of the model."""

    def __init__(
        self, subject: Specimen, ctx: Context, recipe: Recipe, batches: list[Batch], specimen: Specimen
    ) -> None:
        self.ctx, self.recipe, self.batches, self.specimen = ctx, recipe, batches, specimen
        self.module = specimen.module
        self.optimizers = made_optimizers(ctx, recipe, self.module)
        self.scheduler: Any = None
        if recipe.make_scheduler is not None:
            self.scheduler = recipe.make_scheduler(self.optimizers[0], recipe.steps() or 100)
        self.losses: list[float] = []

    def seed(self, seed: int) -> None:
        import numpy
        import torch

        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % (1 << 32))

    def run(self, first: int, last: int) -> None:
        import torch

        per_epoch = min(self.recipe.steps_each_epoch() or 2, 2)
        for step in range(first, last):
            batch = self.batches[step % len(self.batches)]
            loss = self.loss(batch)
            loss.backward()
            if self.recipe.clipping:
                torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.clipping)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if self.scheduler is not None and (self.recipe.interval != "epoch" or (step + 1) % per_epoch == 0):
                metrics = type(self.scheduler).__name__ in ("ReduceLROnPlateau", "GreedyLR")
                self.scheduler.step(float(loss.detach())) if metrics else self.scheduler.step()
            self.losses.append(float(loss.detach()))

    def loss(self, batch: Batch) -> Tensor:
        from torch.nn import functional as F

        assert batch.labels is not None
        takes_mask = batch.mask is not None and self.specimen.can("mask")
        logits = self.specimen.logits(batch.ids, mask=batch.mask if takes_mask else None, train=True, grad=True)
        if self.recipe.loss is not None:
            return self.recipe.loss(logits, batch.labels)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten())

    def save(self, folder: str) -> bytes:
        import numpy
        import torch

        if self.recipe.save is not None:
            self.recipe.save(folder, self.module, self._given(), self.scheduler)
            return b""
        memory = io.BytesIO()
        state = {
            "model": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "random": (torch.get_rng_state(), random.getstate(), numpy.random.get_state()),
        }
        try:
            torch.save(state, memory)
        except Exception as error:
            self.ctx.fail(
                f"the state of model, optimizer and scheduler cannot be saved: {type(error).__name__}: "
                f"{first_line(error)}",
                hint=Hint("a lambda or an open handle is in a state_dict()", "training.resume_differs"),
            )
        return memory.getvalue()

    def load(self, folder: str, saved: bytes) -> None:
        import numpy
        import torch

        try:
            if self.recipe.load is not None:
                self.recipe.load(folder, self.module, self._given(), self.scheduler)
                return
            # these bytes are our own, written a moment ago: loading a pickle from elsewhere would run code
            state = torch.load(io.BytesIO(saved), weights_only=False)
            self.module.load_state_dict(state["model"])
            for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(own)
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
        except Exception as error:
            self.ctx.fail(
                f"what was saved does not load into a run built anew: {type(error).__name__}: {first_line(error)}",
                hint=Hint(
                    "the parts built the second time differ from those of the first: groups, order, names",
                    "training.resume_differs",
                ),
            )
        torch.set_rng_state(state["random"][0])
        random.setstate(state["random"][1])
        numpy.random.set_state(state["random"][2])

    def _given(self) -> Any:
        return self.optimizers[0] if len(self.optimizers) == 1 else self.optimizers

    def snapshot(self) -> Snapshot:
        import torch

        names = {id(p): name for name, p in self.module.named_parameters()}
        moments = {
            names[id(parameter)]: {
                key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in held.items()
            }
            for optimizer in self.optimizers
            for parameter, held in optimizer.state.items()
            if id(parameter) in names
        }
        weights = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        rates = [float(group["lr"] or 0) for optimizer in self.optimizers for group in optimizer.param_groups]
        schedule = getattr(self.scheduler, "last_epoch", None)
        return Snapshot(weights, moments, rates, schedule, torch.get_rng_state())

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}


def _batches(subject: Specimen, ctx: Context, recipe: Recipe) -> list[Batch]:
    """The recipe's own batches cut to a few rows and tokens, else tokens drawn by rule, on the subject's device."""
    from lmconform.recipe import Batch

    time = subject.longest(TIME)
    drawn = [Batch(ids, ids.clone(), None) for ids in (ctx.ids(ROWS, time, salt=step) for step in range(STEPS))]
    if recipe.batches is None and (recipe.texts is None or recipe.collate is None):
        return drawn
    made = []
    for batch in recipe.read(STEPS):
        labels = None if batch.labels is None else batch.labels[:ROWS, :time]
        ids, mask = batch.ids[:ROWS, :time], None if batch.mask is None else batch.mask[:ROWS, :time]
        legal = ids.numel() > 0 and int(ids.min()) >= 0 and int(ids.max()) < subject.vocab_size
        if labels is None or not legal or int(labels.max()) < 0 or ids.shape[1] < 2:
            ctx.note("the recipe's batches cannot be used (no labels, or ids outside the vocabulary): drawn by rule")
            return drawn
        mask = None if mask is None else mask.to(subject.device)
        made.append(Batch(ids.to(subject.device), labels.to(subject.device), mask))
    return made or drawn


def _other_weights(subject: Specimen) -> Specimen:
    """The model built anew under another seed; without a builder a copy whose weights are overwritten."""
    import torch

    if subject.builder is not None:
        return subject.fresh(subject.seed + 1)
    copied = subject.as_loaded().copy()
    with torch.no_grad():
        for tensor in copied.module.state_dict().values():
            if isinstance(tensor, torch.Tensor):
                poison(tensor)
    return copied


def _same(whole: Training, resumed: Training) -> bool:
    import torch

    theirs = resumed.parameters()
    return whole.losses[CUT:] == resumed.losses and all(
        torch.equal(value, theirs[name]) for name, value in whole.parameters().items()
    )


def _compare(ctx: Context, whole: Training, resumed: Training, again: Training, what: str, hint: Hint) -> None:
    """Losses step for step, then weights, within what two uninterrupted runs differ by."""
    unit = tolerance.epsilon(whole.specimen.dtype)
    for step in range(CUT, STEPS):
        expected, got = whole.losses[step], resumed.losses[step - CUT]
        floor = max(abs(expected - again.losses[step]), unit * max(1.0, abs(expected)))
        ctx.within(
            abs(got - expected) if got == got else float("inf"),
            tolerance.FACTOR * floor,
            f"a resumed run differs from an uninterrupted one{what}",
            where=f"loss of step {step} ({step - CUT + 1} after resuming): {got:.6g}, expected {expected:.6g}",
            hint=hint,
        )
    theirs, repeated = resumed.parameters(), again.parameters()
    for name, value in whole.parameters().items():
        floor = max(float((value - repeated[name]).abs().max()), unit * max(1e-6, float(value.abs().max())))
        ctx.equal(
            theirs[name],
            value,
            f"the weights of a resumed run differ from an uninterrupted one's{what}",
            where=f"{name}, {STEPS - CUT} steps after resuming",
            hint=hint,
            allowed=tolerance.FACTOR * floor,
        )


def _lost(at_cut: Snapshot, after_load: Snapshot) -> tuple[str, str]:
    """Which part was not restored: words for the message, and the hint."""
    import torch

    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)

    for name, tensor in at_cut.weights.items():
        if name not in after_load.weights or not equal(tensor, after_load.weights[name]):
            return f": {name} is not restored", SAVING
    for name, held in at_cut.moments.items():
        other = after_load.moments.get(name, {})
        for key, value in held.items():
            if key not in other or not equal(value, other[key]):
                return (
                    f": the optimizer's {key} of {name} "
                    + ("is another parameter's" if key in other and key != "step" else "is not restored"),
                    "load the optimizer's state; its entries go by position, so the groups must be built in the same "
                    "order each time (no set, no sorting by id)",
                )
    if at_cut.rates != after_load.rates:
        return (
            f": the rate is {after_load.rates[0]:.4g} after resuming, {at_cut.rates[0]:.4g} before",
            "save the scheduler's state and load it after the optimizer's: a schedule that starts again warms up again",
        )
    if at_cut.schedule != after_load.schedule:
        return (
            f": the schedule is at step {after_load.schedule} after resuming, at {at_cut.schedule} before",
            "save the scheduler's state and load it too: a schedule that starts again warms up again",
        )
    if not torch.equal(at_cut.randomness, after_load.randomness):
        return ": the random state is not restored", f"dropout draws other masks: {SAVING}"
    return (
        "",
        "weights, moments, rate and random state are restored, so something outside them decides: moments kept as "
        "plain attributes of the optimizer, a counter in the model or in the scheduler that no state_dict holds",
    )


def _through_trainer(subject: Specimen, ctx: Context, recipe: Recipe, batches: list[Batch]) -> None:
    """Five steps of transformers' Trainer against three, a checkpoint, and the other two."""
    if not pretrained(subject.module):
        return
    try:
        import accelerate  # noqa: F401
    except ImportError:
        ctx.note("not tried through Trainer: accelerate is not installed")
        return
    rows = [
        {"input_ids": ids, "labels": labels}
        for batch in batches
        for ids, labels in zip(batch.ids.cpu(), batch.labels.cpu() if batch.labels is not None else batch.ids.cpu())
    ]
    time = min(len(row["input_ids"]) for row in rows)
    rows = [{key: value[:time] for key, value in row.items()} for row in rows]
    with tempfile.TemporaryDirectory(prefix="lmconform-") as folder, quiet_transformers():
        try:
            whole = _trained(subject.as_loaded().copy(), ctx, recipe, rows, folder, None)
            resumed = _trained(_other_weights(subject), ctx, recipe, rows, folder, f"{folder}/checkpoint-{CUT}")
        except Unavailable:
            raise
        except Exception as error:
            ctx.note(f"not tried through Trainer, which raises {type(error).__name__}: {first_line(error)}")
            return
    for name, value in whole.items():
        scale = max(1e-6, float(value.abs().max()))
        ctx.equal(
            resumed[name],
            value,
            "a run resumed from a Trainer checkpoint differs from an uninterrupted one",
            where=f"{name}, {STEPS - CUT} steps after resuming",
            hint=Hint(
                "resume_from_checkpoint restores model, optimizer, scheduler and random state; what else the model or "
                "the optimizer keeps must be in a state_dict()",
                "training.resume_differs",
            ),
            allowed=tolerance.FACTOR * tolerance.epsilon(subject.dtype) * scale,
        )


def _trained(
    specimen: Specimen, ctx: Context, recipe: Recipe, rows: list[dict[str, Any]], folder: str, checkpoint: str | None
) -> dict[str, Tensor]:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    module: Any = specimen.module
    optimizer = made_optimizers(ctx, recipe, module)[0]
    scheduler = recipe.make_scheduler(optimizer, recipe.steps() or 100) if recipe.make_scheduler is not None else None
    arguments = TrainingArguments(
        output_dir=folder, max_steps=STEPS, save_steps=CUT, save_strategy="steps", per_device_train_batch_size=ROWS,
        report_to=[], disable_tqdm=True, logging_strategy="no", seed=ctx.seed + 1,
        use_cpu=specimen.device.type == "cpu", max_grad_norm=recipe.clipping or 0.0,
    )  # fmt: skip
    trainer = Trainer(model=module, args=arguments, train_dataset=rows, optimizers=(optimizer, scheduler))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
