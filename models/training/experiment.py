"""An experiment's folder: made once, never overwritten, resumed only with the options it was begun with.

NAME/options.json      what it was begun with
NAME/tokenizer/        the tokenizer, also of the checkpoints
NAME/checkpoint-N/     what --resume goes on from
NAME/monitors.jsonl    what the monitors saw
NAME/adapter/          the LoRA adapter alone, with --use-lora
NAME/final/            model and tokenizer, adapter merged
NAME/results.json      options, versions, data hashes, losses, exact match, seconds
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from argparse import Namespace
from pathlib import Path
from typing import Any

from models.training.errors import UsageError
from models.training.options import FREE, recorded

PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "peft", "safetensors", "numpy")
SCHEMA_VERSION = 1


class Experiment:
    """The folder of one run."""

    def __init__(self, args: Namespace) -> None:
        self.folder = Path(args.output_dir) / args.experiment_name
        self.options = recorded(args)
        self.resumed = args.resume

    def check(self) -> None:
        """Before anything costly. Raises UsageError: a folder that is there is not touched without --resume."""
        if not self.resumed:
            if self.folder.exists():
                raise UsageError(
                    f"{self.folder} is there already, and nothing is overwritten: "
                    "choose another --experiment-name, or go on with it by --resume"
                )
            return
        if not self.folder.is_dir():
            raise UsageError(f"--resume: there is no experiment {self.folder}")
        begun = self._read_options()
        changed = [
            f"--{name.replace('_', '-')} was {json.dumps(begun.get(name))} and is {json.dumps(value)}"
            for name, value in self.options.items()
            if name not in FREE and begun.get(name) != value
        ]
        if changed:
            raise UsageError(f"--resume: {self.folder} was begun with other options: {'; '.join(changed)}")
        if self.last_checkpoint() is None:
            raise UsageError(f"--resume: {self.folder} has no checkpoint yet; remove it, or choose another name")

    def _read_options(self) -> dict[str, Any]:
        file = self.folder / "options.json"
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UsageError(f"--resume: {file} cannot be read ({error}): this is no experiment's folder") from error
        return found

    def begin(self) -> None:
        """Make the folder, by the first process only; the options are written when they are first known to be good."""
        if is_first() and not self.resumed:
            try:
                self.folder.mkdir(parents=True)
            except OSError as error:
                raise UsageError(f"{self.folder} cannot be made: {error.strerror or error}") from error
            self.write("options.json", self.options)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole: one that was being written when the run died is passed over."""
        found = [
            place
            for place in self.folder.glob("checkpoint-*")
            if place.name.removeprefix("checkpoint-").isdigit() and (place / "trainer_state.json").is_file()
        ]
        return max(found, key=lambda place: int(place.name.removeprefix("checkpoint-")), default=None)

    def write(self, name: str, content: dict[str, Any]) -> Path:
        """A JSON file, written whole and then moved into place. Numbers that are not finite become strings."""
        target = self.folder / name
        beside = target.with_name(target.name + ".part")
        beside.write_text(json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(target)
        return target


def is_first() -> bool:
    """Whether this is the process that writes: the only one, or the first of a torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def versions() -> dict[str, str]:
    """Python and the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def finite(value: Any) -> Any:
    """For JSON, which has no such numbers: those that are not finite become strings."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
