"""`python -m models`: train, generate, compare, diagnose, sweep."""

from __future__ import annotations

import argparse
import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.training import options, systems
from models.training.errors import UsageError
from models.training.experiment import finite

OK, FINDINGS, USAGE, INTERRUPTED = 0, 1, 2, 130
DESCRIPTION = "Train, run, compare and diagnose the reference models."
EPILOG = """\
examples:
  python -m models train adaptive --datasets gsm8k --size small --max-steps 200 --experiment-name first
  python -m models train adaptive --model ./gpt2 --datasets gsm8k,math --use-lora --lora-r 64 --bf16
  python -m models generate experiments/first/final --prompt "Question: What is 2 + 3?" --max-new-tokens 40
  python -m models compare adaptive --model ./gpt2 --plot parity.png
  python -m models compare story --vary phase --seeds 3 --datasets stories.txt --text-unit story
  python -m models sweep story --rates 1e-5:3e-2:8 --text stories.txt
  python -m models diagnose experiments/first/final --profile smoke

exit codes: 0 done; 1 diagnose or compare has findings, or train has diverged; 2 wrong usage or data, nothing was
written; 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `python -m models ARGV`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(arguments)
        code: int = args.run(args)
        return code
    except UsageError as error:
        print(f"models: error: {error}", file=sys.stderr)
        return USAGE
    except SystemExit as stopped:  # --help
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        print("models: interrupted; checkpoints that were written stay, go on with --resume", file=sys.stderr)
        return INTERRUPTED


def _parse(arguments: list[str]) -> Namespace:
    parser = options.Parser(
        prog="python -m models", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(passes_on=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=options.Parser)
    named = arguments[1] if len(arguments) > 1 and not arguments[1].startswith("-") else None
    _add_train(commands, named if arguments[:1] == ["train"] else None, arguments)
    _add_generate(commands)
    _add_compare(commands, named if arguments[:1] == ["compare"] else None)
    _add_diagnose(commands)
    _add_sweep(commands)
    known, rest = parser.parse_known_args(arguments)
    if rest and not known.passes_on:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    known.rest = rest
    return known


def _add_train(commands: Any, named: str | None, arguments: Sequence[str]) -> None:
    """With a system that is named, its own options and defaults."""
    system = systems.get(named) if named is not None else None
    parser = commands.add_parser(
        "train", help="train a system", allow_abbrev=False,
        description=system.summary if system else f"Systems: {', '.join(systems.names())}.",
    )  # fmt: skip
    parser.add_argument("system", metavar="SYSTEM", help=f"one of {', '.join(systems.names())}")
    if system is None:
        options.add_shared(parser)
    else:
        systems.add_training(parser, system, arguments)
    parser.set_defaults(run=_train)


def _train(args: Namespace) -> int:
    from models.training.run import train

    system = systems.get(args.system)
    if args.model is not None:
        systems.register_all()  # a base may be a checkpoint of another system
    results = train(args, system)
    folder = Path(args.output_dir) / args.experiment_name
    made, planned = results["steps"], results["planned_steps"]
    steps = f"{made} steps" if made >= planned else f"stopped by an alert at step {made} of {planned},"
    print(f"{system.name}: {steps} in {results['seconds']['train']:.1f} s, {_moved(results)}")
    for alert in results["alerts"]:
        print(f"  warning: {alert}")
    print(f"results: {folder / 'results.json'}; model: {folder / 'final'}")
    if results["diverged"]:
        print(
            f"models: the run diverged: a loss or weight at its end is not finite, and {folder / 'final'} is of no "
            f"use. Lower --learning-rate ({args.learning_rate:g}); {folder / 'monitors.jsonl'} tells where it began",
            file=sys.stderr,
        )
        return FINDINGS
    return OK


def _moved(results: dict[str, Any]) -> str:
    before, after = results["before"] or {}, results["after"]
    parts = []
    if after["loss"] is not None:
        was = before.get("loss")
        parts.append(f"validation loss {'' if was is None else f'{was:.3f} -> '}{after['loss']:.3f}")
    if after["exact_match"] is not None:
        was = (before.get("exact_match") or {}).get("share")
        now = after["exact_match"]
        share = "" if was is None else f"{was:.1%} -> "
        parts.append(f"exact match {share}{now['share']:.1%} ({now['correct']} of {now['asked']})")
    return ", ".join(parts) or "nothing to evaluate on"


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="let a checkpoint write", allow_abbrev=False)
    parser.add_argument(
        "checkpoint", metavar="SYSTEM|CHECKPOINT",
        help="a directory (an experiment's final/) or a hub id; of a system, its default experiment's",
    )  # fmt: skip
    parser.add_argument("--prompt", action="append", required=True, help="can be given several times")
    parser.add_argument("--max-new-tokens", type=options.positive, default=64)
    parser.add_argument("--temperature", type=options.number(0, above=True), help="sample; greedy without")
    parser.add_argument("--top-k", type=options.positive)
    parser.add_argument("--top-p", type=options.number(0, 1, above=True))
    parser.add_argument("--repetition-penalty", type=options.number(0, above=True), default=1.0)
    parser.add_argument("--beams", type=options.positive, default=1)
    parser.add_argument("--seed", type=options.not_negative, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt")
    parser.set_defaults(run=_generate)


def _generate(args: Namespace) -> int:
    from transformers import set_seed

    from models.training.evaluation import generate

    checkpoint = args.checkpoint
    if checkpoint in systems.names() and not os.path.isdir(checkpoint):
        checkpoint = os.path.join(options.OUTPUT_DIR, checkpoint, "final")
        if not os.path.isdir(checkpoint):
            raise UsageError(
                f"there is no {checkpoint}: train one (python -m models train {args.checkpoint} ...), or name another"
            )
    model, tokenizer = load(checkpoint)
    sampling: dict[str, Any] = {"do_sample": args.temperature is not None or bool(args.top_k or args.top_p)}
    if sampling["do_sample"]:
        sampling |= {"temperature": args.temperature or 1.0, "top_k": args.top_k or 0, "top_p": args.top_p or 1.0}
    set_seed(args.seed)
    written = generate(
        model, tokenizer, args.prompt, max_new_tokens=args.max_new_tokens, num_beams=args.beams,
        repetition_penalty=args.repetition_penalty, **sampling,
    )  # fmt: skip
    for prompt, text in zip(args.prompt, written):
        print(json.dumps({"prompt": prompt, "written": text}, ensure_ascii=False) if args.json else prompt + text)
    return OK


def load(checkpoint: str) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint of any system or of transformers. Raises UsageError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models.training.run import check_base
    from models.training.tokenizing import with_padding

    systems.register_all()
    check_base(checkpoint, "CHECKPOINT")
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        tokenizer = with_padding(AutoTokenizer.from_pretrained(checkpoint))
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"{checkpoint}: {str(error).strip().splitlines()[0]}") from error
    return model, tokenizer


def _add_compare(commands: Any, named: str | None) -> None:
    system = systems.get(named) if named is not None else None
    if system is not None and system.compare is None:
        raise UsageError(f"{system.name} has no comparison")
    parser = commands.add_parser("compare", help="a system against what it should equal", allow_abbrev=False)
    parser.add_argument("system", metavar="SYSTEM")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    if system is not None:
        system.add_compare_arguments(parser)
        parser.set_defaults(passes_on=system.compare_trains)
    parser.set_defaults(run=_compare)


def _compare(args: Namespace) -> int:
    system = systems.get(args.system)
    assert system.compare is not None
    if args.json:
        _check_new(Path(args.json))
    systems.register_all()
    figures = system.compare(args)
    if args.json:
        Path(args.json).write_text(json.dumps(finite(figures), indent=2) + "\n", encoding="utf-8")
    return OK if figures.get("agrees", True) else FINDINGS


def _check_new(file: Path) -> None:
    """Raises UsageError where the file is there, or could not be written once the figures are."""
    try:
        file.open("x").close()
    except FileExistsError:
        raise UsageError(f"{file} is there already, and nothing is overwritten") from None
    except OSError as error:
        raise UsageError(f"--json {file} cannot be written: {error.strerror or error}") from error
    file.unlink()


def _add_diagnose(commands: Any) -> None:
    parser = commands.add_parser(
        "diagnose", help="run the suite on a system or a checkpoint", allow_abbrev=False,
        description="The suite itself: all other options are those of `lmconform check` (--profile, --device, ...).",
    )  # fmt: skip
    parser.add_argument("subject", metavar="SYSTEM|CHECKPOINT")
    parser.set_defaults(run=_diagnose, passes_on=True)  # all that it does not know itself is lmconform's


def _add_sweep(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep", help="many learning rates and seeds of a system in one run", allow_abbrev=False,
        description="`lmconform sweep` on a system's tiny model or a checkpoint: all other options are its own.",
    )  # fmt: skip
    parser.add_argument("subject", metavar="SYSTEM|CHECKPOINT")
    parser.set_defaults(run=_sweep, passes_on=True)


def _diagnose(args: Namespace) -> int:
    from lmconform.cli import main as lmconform

    spec = _spec(args)
    if (text := _described(args.subject)) is not None:
        print(text, flush=True)
    return lmconform(["check", *spec, *args.rest])


def _described(subject: str) -> str | None:
    """What the system has to say of a checkpoint, or of its own tiny model, beside the suite."""
    from transformers import AutoConfig

    if not os.path.isdir(subject):
        system = systems.get(subject)
        return system.describe and system.describe(system.tiny(), None)
    systems.register_all()
    kind = getattr(AutoConfig.from_pretrained(subject), "model_type", None)
    if kind not in systems.names() or (describe := systems.get(kind).describe) is None:
        return None
    return describe(*load(subject))


def _sweep(args: Namespace) -> int:
    from lmconform.cli import main as lmconform

    return lmconform(["sweep", *_spec(args), *_found_text(args.rest)])


def _found_text(rest: Sequence[str]) -> list[str]:
    """The options of a sweep, --text looked up as --datasets is: as it stands, or in LMCONFORM_DATA."""
    from models.training.data import local

    parser = options.Parser(prog="python -m models sweep", add_help=False, allow_abbrev=False)
    parser.add_argument("--text", metavar="FILE")
    known, others = parser.parse_known_args(rest)
    return others if known.text is None else [*others, "--text", str(local(known.text) or known.text)]


def _spec(args: Namespace) -> list[str]:
    """A system or a checkpoint, as lmconform's command line takes it."""
    if args.subject in systems.names() and not os.path.isdir(args.subject):
        return [systems.get(args.subject).spec]
    if os.path.isdir(args.subject):
        from models.training.run import check_base

        systems.register_all()
        check_base(args.subject, "CHECKPOINT")
        return [args.subject, "--import", "models.training.checkpoints"]
    raise UsageError(
        f"{args.subject} is no directory and no system; there are the systems {', '.join(systems.names())}"
    )
