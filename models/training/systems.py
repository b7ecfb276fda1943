"""What the command line needs to know of a system, and where it is found.

A system is a package under `models/` with a module `system.py` that holds `SYSTEM = System(...)` and a function
`tiny()` that builds its smallest model. Nothing else has to be registered.
"""

from __future__ import annotations

import difflib
import importlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
from models.training import options
from models.training.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

Loss = Callable[..., "Tensor"]


@dataclass(frozen=True)
class Preparation:
    """What is there when a system makes its callbacks: the encoded training examples and how they become a batch."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Mapping[str, list[int]]]
    collate: Callable[[Sequence[Mapping[str, list[int]]]], Mapping[str, Tensor]]


def _no_arguments(parser: ArgumentParser) -> None:
    """A system without options of its own."""


def _no_callbacks(args: Namespace, given: Preparation) -> list[TrainerCallback]:
    return []


def _nothing_to_finish(model: PreTrainedModel, args: Namespace, callbacks: Sequence[Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class System:
    """One system, as `python -m models train NAME` uses it.

    - `sizes`: config fields of `tiny`, `small` and `report`; the vocabulary comes from the tokenizer.
    - `build(args, tokenizer)` gives the model: from `args.model` where that is given, else from `sizes[args.size]`.
      Raises UsageError for a base it cannot start from.
    - `tokenizer(texts, size)` is made where no base brings one. Padding must have an id of its own.
    - `add_arguments(parser)` adds options, `defaults` sets other defaults for the shared ones (learning_rate,
      warmup_steps, label_smoothing, ...). `recipes` are named sets of further defaults, of which the option
      `--recipe_option` chooses one (the first without it). What is said on the command line wins over all of them.
    - `loss(args)` gives a loss (outputs, labels, num_items_in_batch) -> scalar, or None for the model's own.
    - `callbacks(args, preparation)`; `finish(model, args, callbacks)` runs behind the training and before the last
      evaluation, may change the model in place, and returns what is to stand in the results under the system's name.
    - `add_compare_arguments(parser)` and `compare(args)` are `python -m models compare NAME`, which returns JSON. With
      `compare_trains`, options that the comparison does not know are those of `train`, and stand in `args.rest`.
    - `describe(model, tokenizer or None)` gives the text that `diagnose` prints in front of the suite.
    - `lora_targets`: names of the modules that LoRA adapts, or "all-linear"; `lora_keeps`: those that are new, and so
      trained whole beside the adapter.
    """

    name: str
    summary: str
    sizes: Mapping[str, Mapping[str, Any]]
    build: Callable[[Namespace, PreTrainedTokenizerBase], PreTrainedModel]
    tokenizer: Callable[[Sequence[str], int], PreTrainedTokenizerBase] | None = None
    add_arguments: Callable[[ArgumentParser], None] = _no_arguments
    defaults: Mapping[str, Any] = field(default_factory=dict)
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe_option: str = "recipe"
    loss: Callable[[Namespace], Loss | None] | None = None
    callbacks: Callable[[Namespace, Preparation], list[TrainerCallback]] = _no_callbacks
    finish: Callable[[PreTrainedModel, Namespace, Sequence[Any]], dict[str, Any]] = _nothing_to_finish
    add_compare_arguments: Callable[[ArgumentParser], None] = _no_arguments
    compare: Callable[[Namespace], dict[str, Any]] | None = None
    compare_trains: bool = False
    describe: Callable[[Any, Any], str] | None = None
    lora_targets: str | Sequence[str] = "all-linear"
    lora_keeps: Sequence[str] = ()

    @property
    def spec(self) -> str:
        """What `lmconform check` is pointed at for the system itself."""
        return f"models.{self.name}.system:tiny"

    def tiny(self) -> PreTrainedModel:
        """The system's smallest model."""
        made: PreTrainedModel = importlib.import_module(f"models.{self.name}.system").tiny()
        return made


def names() -> list[str]:
    """The systems that are there. Looks for the files and imports none."""
    return sorted(file.parent.name for place in models.__path__ for file in Path(place).glob("*/system.py"))


def get(name: str) -> System:
    """The system of that name. Raises UsageError that suggests the nearest."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names())}"
        raise UsageError(f"there is no system {name!r}{hint}")
    found: System = importlib.import_module(f"models.{name}.system").SYSTEM
    return found


def add_training(parser: ArgumentParser, system: System, arguments: Sequence[str]) -> None:
    """The options of `train SYSTEM`; defaults are the system's and those of the recipe that `arguments` choose."""
    defaults = dict(system.defaults)
    if system.recipes:
        names = tuple(system.recipes)
        for one in (chooser := options.Parser(prog=parser.prog, add_help=False, allow_abbrev=False), parser):
            one.add_argument(
                f"--{system.recipe_option}", choices=names, default=names[0], help=f"recipe (default {names[0]})"
            )
        defaults |= system.recipes[getattr(chooser.parse_known_args(arguments)[0], system.recipe_option)]
    options.add_shared(parser, defaults.get("learning_rate"))
    system.add_arguments(parser)
    parser.set_defaults(**defaults)


def training_options(system: System, arguments: Sequence[str]) -> Namespace:
    """What `train SYSTEM ARGUMENTS` would run with. Raises UsageError."""
    parser = options.Parser(prog=f"python -m models train {system.name}", allow_abbrev=False)
    add_training(parser, system, arguments)
    args = parser.parse_args(list(arguments))
    args.system = system.name
    options.validate(args)
    return args


def own_config(base: str, kind: str) -> PretrainedConfig:
    """The configuration of `--model base`, a checkpoint of the system `kind`. Raises UsageError for any other."""
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(base)
    if found.model_type != kind:
        raise UsageError(f"--model {base}: {kind} starts from its own checkpoints, not from {found.model_type}")
    return found


def register_all() -> None:
    """Import every system, so that the Auto classes of transformers know their checkpoints."""
    for name in names():
        importlib.import_module(f"models.{name}")
