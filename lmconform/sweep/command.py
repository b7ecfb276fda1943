"""`lmconform sweep`: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from lmconform.options import OptionError, require_writable
from lmconform.results import jsonable, write_whole
from lmconform.subject import BuildError
from lmconform.sweep.rates import ASSUMED_STEPS, GivenRate, Outcome, given_rate, outcome, parse_rates

if TYPE_CHECKING:
    from rich.console import Console

    from lmconform.sweep.members import Training

EPILOG = """\
exit codes: 0 some rate learns, and the recipe's own, if there is one, is good; 1 none does, or it is not; 2 wrong usage
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lmconform sweep`."""
    parser.description = "Train a model with many learning rates and seeds at once, and say which rates are good."
    parser.epilog = EPILOG
    parser.add_argument("spec", metavar="SPEC", help="the model, as for lmconform check")
    parser.add_argument(
        "--rates",
        default="1e-5:1e-1:12",
        metavar="FIRST:LAST:COUNT",
        help="or a list: 1e-4,3e-4 (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each rate (default: 3)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of AdamW (default: 100)")
    parser.add_argument("--text", metavar="FILE", help="train on this text (default: a corpus made by rule)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    parser.add_argument("--sequential", action="store_true", help="one at a time instead of vectorised")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help="import first")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a checkpoint that brings its own code")
    parser.add_argument("--json", metavar="FILE", help="write rows, good_range, recommended, mode and reason")
    parser.add_argument("--png", metavar="FILE", help="draw the curve")


def main(args: argparse.Namespace) -> int:
    """Exit code 0: some rate learns; 1: none does, or the recipe's own is not good; 2: usage or no subject."""
    try:
        return _run(args)
    except (OptionError, BuildError) as error:
        print(f"lmconform sweep: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    from lmconform.loading import import_first
    from lmconform.report.terminal import make_console
    from lmconform.sweep import corpus as corpora
    from lmconform.sweep.plots import draw, require_matplotlib, terminal_curve

    rates = parse_rates(args.rates)
    for name, least in (("seeds", 1), ("steps", 2)):
        if getattr(args, name) < least:
            raise OptionError(f"--{name} {getattr(args, name)}: at least {least}")
    text = corpora.read_text(args.text) if args.text else None
    require_writable(args.json, args.png)
    if args.png:
        require_matplotlib()
    for module in args.imports:
        import_first(module)

    from lmconform.subject import as_subject
    from lmconform.sweep.members import Member, NothingToTrain, train

    console = make_console()
    subject = as_subject(args.spec, trust_remote_code=args.trust_remote_code)
    specimen = subject.open(device=args.device, announce=lambda said: print(said, file=sys.stderr))
    corpus = corpora.rule_corpus(specimen) if text is None else corpora.text_corpus(specimen, text, args.text)
    members = [Member(rate, seed) for rate in rates for seed in range(args.seeds)]
    batches = corpus.batches(specimen)
    try:
        with _progress(console, len(members) * args.steps) as progress:
            training = train(
                specimen, members, batches, args.steps, sequential=args.sequential, keep=False, progress=progress
            )
    except NothingToTrain as error:
        raise OptionError(str(error)) from error
    found = outcome(training, args.steps, target=corpus.entropy - 0.05)
    given = given_rate(specimen.recipe, specimen.fresh(0).module if specimen.builder else specimen.copy().module)
    _show(console, args, specimen.name, corpus.name, found, training, given)
    mine = given.rate if isinstance(given, GivenRate) and given.rate > 0 else None
    for line in terminal_curve(found, mine):
        console.print(line)
    console.print()
    place = _say(console, args.spec, found, given)
    if args.json:
        _write_json(args.json, specimen.name, corpus.name, found, training, given, place)
    if args.png:
        draw(args.png, found, f"{specimen.name}: {corpus.name}", [(mine, f"yours {mine:.2g}")] if mine else [])
    return 0 if found.recommended is not None and place in ("", "good") else 1


def _progress(console: Console, total: int) -> Any:
    from contextlib import contextmanager

    from rich.progress import Progress

    @contextmanager
    def shown() -> Any:
        if not console.is_terminal:
            yield lambda done, of: None
            return
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("training", total=total)
            yield lambda done, of: bar.update(task, completed=done, total=of)

    return shown()


def _show(
    console: Console, args: argparse.Namespace, name: str, text: str, found: Outcome, training: Training,
    given: GivenRate | str,
) -> None:  # fmt: skip
    from rich.table import Table

    count = len(training.members)
    console.print(f"{name}: {len(found.rows)} rates x {args.seeds} seeds x {args.steps} steps of AdamW on {text}")
    how = training.mode
    if training.mode == "vectorised":
        chunks = math.ceil(count / training.chunk)
        how += f", {count} members in {chunks} {'go' if chunks == 1 else 'goes'}"
        how += f", about {training.chunk * training.member_bytes / 2**20:.0f} MiB"
    else:
        how += f" ({training.reason})"
    console.print(f"{how}, {training.seconds:.1f} s; dropout off")
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("rate", "loss at the end", "lowest", "highest", ""):
        table.add_column(title, justify="left" if not title else "right")
    for row in found.rows:
        state = row.state + (" <- recommended" if row.rate == found.recommended else "")
        table.add_row(f"{row.rate:.2e}", *(_number(value) for value in (row.final, row.low, row.high)), state)
    console.print(table)
    console.print()


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _say(console: Console, spec: str, found: Outcome, given: GivenRate | str) -> str:
    """The verdict in words; returns where the user's rate lies, empty where there is none."""
    if found.good_range is None or found.recommended is None:
        console.print(
            f"No rate learns: the lowest loss is {_number(found.best.final)}, and knowing only how often each token "
            f"comes would give {found.target:.2f}. Look at what can be trained: lmconform check {spec} --select "
            "training,gradients"
        )
        return ""
    low, high = found.good_range
    console.print(f"good range: {low:.2g} to {high:.2g}; recommended: {found.recommended:.2g}")
    if isinstance(given, str):
        if given != "no recipe was given":
            console.print(f"your own rate: {given}")
        return ""
    steps = given.steps or ASSUMED_STEPS
    place = found.place(given.rate, steps)
    longer = f", for a run of {steps} steps{'' if given.steps else ' (assumed: the recipe does not say)'}"
    words = {"good": "in the good range", "too small": "too small", "too large": "too large"}[place]
    console.print(f"your own rate: {given.words}: {words}{longer if steps > found.steps else ''}")
    return place


def _write_json(
    file: str, name: str, text: str, found: Outcome, training: Training, given: GivenRate | str, place: str
) -> None:
    import json

    rows: list[dict[str, Any]] = []
    for row in found.rows:
        runs = [
            {"seed": member.seed, "diverged": gone, "losses": losses}
            for member, losses, gone in zip(training.members, training.losses, training.diverged, strict=True)
            if member.rate == row.rate
        ]
        rows.append({**row.__dict__, "runs": runs})
    data = {
        "schema_version": 1,
        "subject": name,
        "text": text,
        "steps": found.steps,
        "rows": rows,
        "good_range": None if found.good_range is None else list(found.good_range),
        "recommended": found.recommended,
        "mode": training.mode,
        "reason": training.reason,
        "seconds": training.seconds,
        "given": None if isinstance(given, str) else {"rate": given.rate, "steps": given.steps, "place": place},
    }
    write_whole(file, json.dumps(jsonable(data), indent=1) + "\n")
