"""The options that all systems share, and what can be said against them before anything is loaded."""

from __future__ import annotations

import argparse
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any, NoReturn

from models.training.errors import UsageError

SIZES = ("tiny", "small", "report")
RATES = {"tiny": 5e-3, "small": 1e-3, "report": 3e-4}  # narrower models take and need higher rates
OUTPUT_DIR = "experiments"
BASE_RATE, LORA_RATE = 5e-5, 3e-4
BY_SIZE = f"by size {', '.join(map(str, RATES.values()))}; of a base {BASE_RATE:g}, with LoRA {LORA_RATE:g}"
TOKENIZERS = ("byte-pair", "word", "character")
TEXT_UNITS = ("line", "story")
NAME = re.compile(r"[\w][\w.+-]*")
# what a resumed run may change: how long it goes on, how often it reports, where it runs
FREE = ("max_steps", "epochs", "save_steps", "eval_steps", "logging_steps", "resume", "quiet", "cpu", "output_dir")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def number(low: float, high: float = float("inf"), *, above: bool = False) -> Callable[[str], float]:
    """A float from `low` (or, with `above`, over it) to `high`."""

    def read(text: str) -> float:
        value = float(text)
        if not (low < value <= high if above else low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'from'} {low:g} to {high:g}")
        return value

    read.__name__ = "number"
    return read


def steps_or_share(text: str) -> int | float:
    """A number of steps, or below 1 a share of all steps."""
    value = number(0)(text)
    if value >= 1 and value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is neither a whole number of steps nor a share below 1")
    return value if 0 < value < 1 else int(value)


class Parser(ArgumentParser):
    """Refuses by UsageError, with the usage, instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.format_usage().rstrip()}")


def add_shared(parser: ArgumentParser, rate: float | None = None) -> None:
    """Model, data, training and experiment. `rate`: a system's or recipe's own, for the help text."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="BASE", help="start from this checkpoint: a directory or a hub id")
    model.add_argument(
        "--size", choices=SIZES, default="tiny", help="without --model: the sizes to build (default %(default)s)"
    )
    model.add_argument(
        "--vocab-size",
        type=positive,
        default=1024,
        help="of the tokenizer that is made without --model (default %(default)s)",
    )
    model.add_argument(
        "--tokenizer", choices=TOKENIZERS, help="to make without --model (default: the system's own kind)"
    )
    model.add_argument("--use-lora", action="store_true", help="train a low-rank adapter, and merge it at the end")
    model.add_argument(
        "--lora-r", type=positive, default=16, help="its rank (default %(default)s; alpha is twice that)"
    )
    model.add_argument("--lora-dropout", type=number(0, 1), default=0.0, help="default %(default)s")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--datasets", required=True, metavar="A,B",
        help="gsm8k, math, hub ids or local paths; columns question and answer, problem and solution, or text",
    )  # fmt: skip
    data.add_argument(
        "--text-unit", choices=TEXT_UNITS, default="line",
        help="what is one text in a .txt file: a line, or a story: a single line break parts them, blank lines their "
        "paragraphs (default %(default)s)",
    )  # fmt: skip
    data.add_argument("--max-length", type=positive, default=512, help="tokens of an example (default %(default)s)")
    data.add_argument(
        "--too-long",
        choices=("error", "drop"),
        default="error",
        help="what to do with longer ones, never cut (default %(default)s)",
    )
    data.add_argument("--train-samples", type=positive, help="use only so many examples")
    data.add_argument(
        "--eval-samples", type=not_negative, default=64, help="validation examples, 0: none (default %(default)s)"
    )
    data.add_argument("--max-new-tokens", type=positive, default=128, help="of an answer (default %(default)s)")

    training = parser.add_argument_group("training")
    training.add_argument("--batch-size", type=positive, default=8, help="examples (default %(default)s)")
    training.add_argument(
        "--accumulation", type=positive, default=1, help="micro-batches of an optimizer step (default %(default)s)"
    )
    length = training.add_mutually_exclusive_group()
    length.add_argument("--max-steps", type=positive, help="optimizer steps")
    length.add_argument("--epochs", type=number(0, above=True), help="instead of steps (default 1)")
    training.add_argument(
        "--learning-rate", type=number(0, above=True),
        help=f"peak rate (default {BY_SIZE if rate is None else format(rate, 'g')})",
    )  # fmt: skip
    training.add_argument(
        "--lr-scheduler", choices=("linear", "cosine", "constant"), default="linear", help="default %(default)s"
    )
    training.add_argument(
        "--warmup-steps", type=steps_or_share, default=0, help="below 1: a share of all steps (default %(default)s)"
    )
    training.add_argument("--weight-decay", type=number(0), default=0.0, help="default %(default)s")
    training.add_argument("--adam-beta1", type=number(0, 1), default=0.9, help="default %(default)s")
    training.add_argument("--adam-beta2", type=number(0, 1), default=0.999, help="default %(default)s")
    training.add_argument("--label-smoothing", type=number(0, 1), default=0.0, help="default %(default)s")
    training.add_argument("--max-grad-norm", type=number(0), default=1.0, help="0: no clipping (default %(default)s)")
    training.add_argument("--gradient-checkpointing", action="store_true")
    precision = training.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="mixed precision; needs an accelerator")
    precision.add_argument("--bf16", action="store_true", help="mixed precision")
    training.add_argument("--seed", type=not_negative, default=0, help="default %(default)s")
    training.add_argument("--cpu", action="store_true", help="even where there is an accelerator")

    experiment = parser.add_argument_group("experiment")
    experiment.add_argument("--experiment-name", metavar="NAME", help="folder in --output-dir (default: the system)")
    experiment.add_argument("--output-dir", default=OUTPUT_DIR, metavar="DIR", help="default %(default)s")
    experiment.add_argument("--resume", action="store_true", help="go on from the experiment's last checkpoint")
    experiment.add_argument("--save-steps", type=positive, help="default: a fifth of the run")
    experiment.add_argument("--eval-steps", type=positive, help="default: a fifth of the run")
    experiment.add_argument("--logging-steps", type=positive, default=10, help="default %(default)s")
    experiment.add_argument("--stop-on-alert", action="store_true", help="end the run at a monitor's first alert")
    experiment.add_argument(
        "--sample-every", type=positive, metavar="N", help="let the model write every N steps, and monitor what comes"
    )
    experiment.add_argument("--quiet", action="store_true", help="no progress bars")


def validate(args: Namespace) -> None:
    """What can be told without a model. Raises UsageError."""
    if args.tokenizer is not None and args.model is not None:
        raise UsageError(f"--tokenizer {args.tokenizer}: {args.model} brings its own, and is of no use with another")
    if args.experiment_name is None:
        args.experiment_name = args.system
    if not NAME.fullmatch(args.experiment_name):
        raise UsageError(f"--experiment-name {args.experiment_name!r}: letters, digits, '.', '-', '+' and '_' only")
    if args.max_steps is None and args.epochs is None:
        args.epochs = 1.0
    if args.learning_rate is None:
        base = LORA_RATE if args.use_lora else BASE_RATE
        args.learning_rate = RATES[args.size] if args.model is None else base
    if args.fp16:
        import torch

        if args.cpu or not torch.accelerator.is_available():
            raise UsageError("--fp16 needs an accelerator: on the CPU use --bf16, or neither")


def recorded(args: Namespace) -> dict[str, Any]:
    """The options as they stand in the experiment's folder."""
    return {name: value for name, value in vars(args).items() if name not in ("run", "resume") and not callable(value)}
