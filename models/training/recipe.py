"""The recipe of a system's default run, for whoever wants to check or repeat it without running the command."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from models.training.run import training_arguments
from models.training.systems import System, training_options

if TYPE_CHECKING:
    from transformers import TrainingArguments


def default_arguments(system: System, *options: str, steps: int) -> TrainingArguments:
    """The Trainer's arguments of `python -m models train SYSTEM` with a number of steps said, and these options."""
    args = training_options(system, ["--datasets", "none", "--max-steps", str(steps), *options])
    return training_arguments(args, Path(tempfile.gettempdir()) / system.name, steps=steps, evaluates=False)
