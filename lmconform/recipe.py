"""Recipe: how a model is trained, as far as its user hands that over. Every part is optional."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmconform import conventions
from lmconform.schedules import ClosedForm
from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

INTERVALS = ("step", "epoch", "batch")
WORDS = {
    "make_optimizer": "make_optimizer(model)",
    "make_scheduler": "make_scheduler(optimizer, total_steps)",
    "loss": "loss(logits, labels)",
    "collate": "collate(texts)",
    "batches": "batches (or texts and collate)",
    "total_steps": "total_steps (or epochs and batches)",
    "steps_per_epoch": "steps_per_epoch (or epochs, or batches that have a length)",
}


@dataclass(frozen=True)
class Batch:
    """One batch as it reaches the model: ids and labels [batch, time], int64; mask of 1 and 0, or None."""

    ids: Tensor
    labels: Tensor | None
    mask: Tensor | None


@dataclass
class Recipe:
    """What is handed over beside the model: `Subject(build, recipe=Recipe(...))`. All parts are optional.

    - `make_optimizer(model)` gives a torch optimizer (or several); `make_scheduler(optimizer, total_steps)` the
      scheduler, whose step() the training loop calls once per `interval`: "step" (optimizer step), "epoch", or "batch"
      (micro-batch). `total_steps`, `steps_per_epoch` and `warmup_steps` count optimizer steps; one optimizer step takes
      `accumulation` micro-batches.
    - `schedule` is the closed form that the rate should follow, times `learning_rate`: a callable step -> factor, or a
      name (constant, linear_warmup, linear, cosine, inverse_sqrt, noam) with `warmup_steps`, `start_factor`,
      `min_factor` and `width`.
    - `weight_decay` is the stated decay; `no_decay` says what is left out of it: a callable (name, parameter) -> bool,
      a sequence of parts of names, or () where everything is meant to be decayed.
    - `loss(logits, labels)` with logits [batch, time, vocab] and labels as `collate` makes them; `label_smoothing` is
      what the loss (or, without one, the model's own) is stated to smooth by.
    - `collate(texts)` gives {"input_ids", "labels", "attention_mask"}; `batches` are ready batches (an iterable, or a
      callable that returns one): such mappings, or (ids, labels) pairs. `texts` and `validation` are strings, or
      batches. `encode_prompt(text)` gives the ids that generation starts from.
    - `save(folder, model, optimizer, scheduler)` and `load(folder, model, optimizer, scheduler)`: how a run is
      interrupted and resumed, where it is not by state dicts.
    """

    make_optimizer: Callable[[nn.Module], Any] | None = None
    make_scheduler: Callable[[Any, int], Any] | None = None
    interval: str = "step"
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    collate: Callable[[Sequence[str]], Any] | None = None
    texts: Sequence[str] | None = None
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None
    validation: Any = None
    tokenizer: Any = None
    learning_rate: float | None = None
    accumulation: int = 1
    clipping: float | None = None
    precision: str | None = None
    epochs: float | None = None
    total_steps: int | None = None
    schedule: Callable[[int], float] | str | None = None
    weight_decay: float | None = None
    no_decay: Callable[[str, Any], bool] | Sequence[str] | None = None
    steps_per_epoch: int | None = None
    warmup_steps: float = 0
    start_factor: float = 0.0
    min_factor: float = 0.0
    width: int | None = None
    label_smoothing: float | None = None
    batch_size: int = 8
    encode_prompt: Callable[[str], Any] | None = None
    save: Callable[[str, Any, Any, Any], Any] | None = None
    load: Callable[[str, Any, Any, Any], Any] | None = None
    _streams: dict[str, _Stream] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.interval not in INTERVALS:
            raise ValueError(f"interval {self.interval!r} is none of {', '.join(INTERVALS)}")
        if self.accumulation < 1:
            raise ValueError(f"accumulation is a number of micro-batches from 1, not {self.accumulation}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is a number of optimizer steps from 0, not {self.warmup_steps}")
        if isinstance(self.schedule, str) and self.schedule not in ("linear", "cosine"):
            self.closed_form()  # a mistyped name or a missing number shows here; those two need the length of the run
        if (self.save is None) != (self.load is None):
            raise ValueError("save and load come together")

    # -- parts -----------------------------------------------------------------------------------------------------

    def need(self, *parts: str) -> None:
        """Raises Unavailable, naming the first of these parts that was not given."""
        for part in parts:
            if getattr(self, part) is None:
                raise Unavailable(f"the recipe gives no {WORDS.get(part, part)}")

    def optimizers(self, model: nn.Module) -> list[Optimizer]:
        """What make_optimizer gives, as a list. Raises Unavailable where it was not given, TypeError for other things.

        An optimizer that a library has wrapped (an `.optimizer` inside) is unwrapped.
        """
        self.need("make_optimizer")
        assert self.make_optimizer is not None
        made = self.make_optimizer(model)
        found = list(made) if isinstance(made, list | tuple) else [made]
        inner = [item if hasattr(item, "param_groups") else getattr(item, "optimizer", item) for item in found]
        for item in inner:
            if not hasattr(item, "param_groups"):
                raise TypeError(f"make_optimizer(model) returned {type(item).__name__}, which has no param_groups")
        return inner

    def steps(self) -> int | None:
        """Optimizer steps of the whole run: stated, or epochs times those of an epoch; None where it cannot be told."""
        if self.total_steps is not None:
            return self.total_steps
        each = self.steps_each_epoch()
        return None if each is None or self.epochs is None else math.ceil(self.epochs * each)

    def steps_each_epoch(self) -> int | None:
        """Optimizer steps of one epoch; None where it cannot be told."""
        if self.steps_per_epoch is not None:
            return self.steps_per_epoch
        count = self.batch_count()
        if count is not None:
            return math.ceil(count / self.accumulation)
        if self.total_steps is not None and self.epochs:
            return max(1, round(self.total_steps / self.epochs))
        return None

    def batch_count(self) -> int | None:
        """Micro-batches of one epoch, where the batches have a length."""
        if self.batches is not None:
            given = self.batches() if callable(self.batches) else self.batches
            try:
                return len(given)  # type: ignore[arg-type]
            except TypeError:
                return None
        if self.texts is not None and self.collate is not None:
            return math.ceil(len(self.texts) / self.batch_size)
        return None

    def closed_form(self) -> Callable[[float], float] | None:
        """The factor by optimizer step, None where no schedule is stated. Raises ValueError for missing numbers."""
        if not isinstance(self.schedule, str):
            return self.schedule  # type: ignore[return-value]
        return ClosedForm(
            self.schedule, self.warmup_steps, self.steps(), self.start_factor, self.min_factor, self.width
        )

    def decays(self, name: str, parameter: Any) -> bool | None:
        """Whether that parameter is meant to be decayed; None where the recipe does not say."""
        if self.no_decay is None:
            return None
        if callable(self.no_decay):
            return not self.no_decay(name, parameter)
        return not any(part in name for part in self.no_decay)

    # -- data ------------------------------------------------------------------------------------------------------

    def read(self, limit: int = 64) -> list[Batch]:
        """The first batches as the model gets them. Raises Unavailable where neither batches nor collate is given."""
        if self.batches is None and (self.texts is None or self.collate is None):
            raise Unavailable(f"the recipe gives no {WORDS['batches']}")
        if "batches" not in self._streams:
            given = self._collated(self.texts) if self.batches is None else self.batches
            self._streams["batches"] = _Stream(given() if callable(given) else given)
        return [as_batch(raw) for raw in self._streams["batches"].first(limit)]

    def read_validation(self, limit: int = 64) -> list[Batch]:
        """The same of the validation data; strings go through collate."""
        self.need("validation")
        if "validation" not in self._streams:
            given = self.validation() if callable(self.validation) else self.validation
            if isinstance(given, Sequence) and given and isinstance(given[0], str):
                self.need("collate")
                given = self._collated(given)
            self._streams["validation"] = _Stream(given)
        return [as_batch(raw) for raw in self._streams["validation"].first(limit)]

    def _collated(self, texts: Sequence[str] | None) -> Iterator[Any]:
        assert texts is not None
        assert self.collate is not None
        for start in range(0, len(texts), self.batch_size):
            yield self.collate(texts[start : start + self.batch_size])

    # -- transformers ----------------------------------------------------------------------------------------------

    @classmethod
    def from_trainer(cls, trainer: Any, **parts: Any) -> Recipe:
        """The recipe of a transformers.Trainer: its optimizer, schedule, loss, data and numbers; `parts` override.

        Nothing is trained. An optimizer that was given to the Trainer is carried over to the model that is checked, by
        the names of its parameters, so that one which holds another model's tensors still does.
        """
        optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
        if getattr(trainer, "_created_lr_scheduler", False):
            scheduler = None

        def make_optimizer(model: nn.Module) -> Any:
            if optimizer is not None:
                return _carried_over(getattr(optimizer, "optimizer", optimizer), trainer.model, model)
            stand_in = copy.copy(trainer)
            stand_in.model = stand_in.model_wrapped = model
            stand_in.optimizer = None
            stand_in.create_optimizer()
            return stand_in.optimizer

        def make_scheduler(made: Any, total_steps: int) -> Any:
            if scheduler is not None:
                return copy.deepcopy(scheduler, {id(scheduler.optimizer): made})
            stand_in = copy.copy(trainer)
            stand_in.optimizer, stand_in.lr_scheduler = made, None
            return stand_in.create_scheduler(total_steps, made)

        found: dict[str, Any] = {
            "make_optimizer": make_optimizer,
            "make_scheduler": make_scheduler,
            "loss": _trainer_loss(trainer),
            "tokenizer": getattr(trainer, "processing_class", None),
            "batches": None if trainer.train_dataset is None else trainer.get_train_dataloader,
            "validation": None if trainer.eval_dataset is None else trainer.get_eval_dataloader,
        }
        if optimizer is not None or scheduler is not None:  # they came ready: the arguments do not state them
            found.update(schedule=None, learning_rate=None, weight_decay=None)
        return cls.from_training_arguments(trainer.args, **{**found, **parts})

    @classmethod
    def from_training_arguments(cls, args: Any, **parts: Any) -> Recipe:
        """The recipe that transformers.TrainingArguments state; `parts` (loss, collate, texts, ...) are added."""
        from transformers import Trainer

        def make_optimizer(model: nn.Module) -> Any:
            stand_in: Any = Trainer.__new__(Trainer)
            stand_in.args, stand_in.model, stand_in.model_wrapped = args, model, model
            stand_in.optimizer = stand_in.optimizer_cls_and_kwargs = None
            stand_in.create_optimizer()
            return stand_in.optimizer

        def make_scheduler(optimizer: Any, total_steps: int) -> Any:
            stand_in: Any = Trainer.__new__(Trainer)
            stand_in.args, stand_in.optimizer, stand_in.lr_scheduler = args, optimizer, None
            return stand_in.create_scheduler(total_steps, optimizer)

        found: dict[str, Any] = {
            "make_optimizer": make_optimizer,
            "make_scheduler": make_scheduler,
            "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
            "accumulation": args.gradient_accumulation_steps,
            "clipping": args.max_grad_norm or None,
            "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else None,
            "label_smoothing": args.label_smoothing_factor or None,
            "batch_size": args.per_device_train_batch_size,
        }
        if args.max_steps > 0:
            found["total_steps"] = args.max_steps
        else:
            found["epochs"] = args.num_train_epochs
        recipe = cls(**{**found, **parts})
        if "schedule" not in parts:
            recipe._state_schedule(args)
        return recipe

    def _state_schedule(self, args: Any) -> None:
        """The closed form of the arguments' schedule, where it is one of those known here."""
        name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        total, more = self.steps(), dict(args.lr_scheduler_kwargs or {})
        if total is None:
            return
        if name == "cosine_with_min_lr" and "min_lr_rate" in more:
            name, self.min_factor = "cosine", more.pop("min_lr_rate")
        if name in ("constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt") and not more:
            self.warmup_steps = 0 if name == "constant" else args.get_warmup_steps(total)
            self.schedule = name


class _Stream:
    """The beginning of an iterable, kept, so that a generator can be read more than once."""

    def __init__(self, given: Iterable[Any]) -> None:
        self._rest = iter(given)
        self._kept: list[Any] = []

    def first(self, limit: int) -> list[Any]:
        self._kept.extend(itertools.islice(self._rest, max(0, limit - len(self._kept))))
        return self._kept[:limit]


def as_batch(raw: Any) -> Batch:
    """A Batch from a mapping, an (ids, labels) pair or the ids alone. Raises TypeError that says what it got."""
    import torch

    if isinstance(raw, Mapping) or hasattr(raw, "keys"):
        ids = _first(raw, conventions.IDS)
        labels = _first(raw, conventions.LABELS)
        mask = _first(raw, conventions.MASK)
        if ids is None:
            raise TypeError(f"a batch with the keys {', '.join(raw.keys())}: none of them holds token ids")
    elif isinstance(raw, tuple | list) and len(raw) in (2, 3):
        ids, labels, mask = (*raw, None)[:3]
    else:
        ids, labels, mask = raw, None, None

    def table(value: Any) -> Tensor | None:
        if value is None:
            return None
        made = torch.as_tensor(value)
        if made.dim() not in (1, 2):
            raise TypeError(f"a batch of shape {list(made.shape)}: expected [batch, time]")
        return (made if made.dim() == 2 else made[None]).long().cpu()

    made = table(ids)
    assert made is not None
    return Batch(made, table(labels), table(mask))


def _first(mapping: Any, names: Sequence[str]) -> Any:
    return next((mapping[name] for name in names if name in mapping), None)


def _carried_over(optimizer: Any, source: nn.Module, target: nn.Module) -> Any:
    """A copy of the optimizer that holds the target's parameters where the original holds the source's."""
    names = {name: parameter for name, parameter in target.named_parameters(remove_duplicate=False)}
    memo: dict[int, Any] = {
        id(parameter): names[name]
        for name, parameter in source.named_parameters(remove_duplicate=False)
        if name in names
    }
    return copy.deepcopy(optimizer, memo)


def _trainer_loss(trainer: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The loss that a Trainer computes from the logits itself; None where it takes the model's."""
    custom, smoother = trainer.compute_loss_func, trainer.label_smoother
    if custom is not None:
        return lambda logits, labels: custom({"logits": logits}, labels, num_items_in_batch=None)
    if smoother is None:
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # as Trainer.compute_loss decides it: by the name of the class, so a model of one's own is not shifted
    shifts = type(trainer.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return lambda logits, labels: smoother({"logits": logits}, labels, shift_labels=shifts)
