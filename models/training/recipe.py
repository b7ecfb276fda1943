"""The recipe of a system's default run, for whoever wants to check or repeat it without running the command."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from models.training.options import add_shared, validate
from models.training.run import training_arguments
from models.training.systems import System

if TYPE_CHECKING:
    from transformers import TrainingArguments


def default_arguments(system: System, *, steps: int) -> TrainingArguments:
    """The Trainer's arguments of `python -m models train SYSTEM` with nothing but a number of steps said."""
    from argparse import ArgumentParser

    parser = ArgumentParser()
    add_shared(parser)
    system.add_arguments(parser)
    parser.set_defaults(**system.defaults)
    args = parser.parse_args(["--datasets", "none", "--max-steps", str(steps), "--experiment-name", system.name])
    validate(args)
    return training_arguments(args, Path(tempfile.gettempdir()) / system.name, steps=steps, evaluates=False)
