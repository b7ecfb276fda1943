"""The command line: `lmconform check`, `list`, `explain`, `zoo`, `sweep`, `bench`, `snapshot`,
`compare`, `report`.

The process of `check` never imports torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmconform import __version__, lookup
from lmconform.expected import ExpectedError, draft, known_deviations, read_expected
from lmconform.flags import FLAGS
from lmconform.isolation import Child, WorkerFailure
from lmconform.options import NAMES, OptionError, Options, make_options, read_ini, require_writable
from lmconform.registry import UnknownCheck, select_checks
from lmconform.results import Report, Result, write_whole
from lmconform.runner import run_all
from lmconform.session import Session, chosen_case, versions
from lmconform.subject import BuildError

if TYPE_CHECKING:
    from rich.console import Console

OK, FINDINGS, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130
HERE_BY_DEFAULT: dict[str, Any] = {"isolate": True}

CHECK_HELP = """\
Check causal language models. A SPEC is, in this order: an existing directory (a checkpoint), file.py:attr,
transformers:TYPE (that architecture, shrunk, random weights), pkg.mod:attr, or a hub id. attr is an nn.Module, a
callable without arguments that returns one (or a (model, tokenizer) pair), or a lmconform.Subject.
"""
CHECK_EPILOG = """\
Options can also stand in [tool.lmconform] of ./pyproject.toml, with these names; the command line goes first.

With several SPECs, --json FILE must contain {subject}, which becomes each SPEC in turn (one file a subject, one
schema); --html FILE is one page for all of them. A SPEC that cannot be built does not stop the others.

exit codes: 0 something ran and nothing failed; 1 findings; 2 a subject could not be found or built, or wrong usage;
3 lmconform itself failed; of several subjects the highest counts.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `lmconform ARGV`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a message may hold what the terminal cannot show
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(arguments)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except (OptionError, UnknownCheck, ExpectedError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, head perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        traceback.print_exc()
        print(f"lmconform: internal error ({type(error).__name__}); the traceback is above", file=sys.stderr)
        return INTERNAL


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Like parse_args, but SPECs may stand between options, and a mistyped option suggests the nearest."""
    parser = build_parser(arguments)
    args, rest = parser.parse_known_args(arguments)
    if unknown := next((word for word in rest if word.startswith("-") or args.run is not _check), None):
        known = ["--" + name.replace("_", "-") for name in [*NAMES, "write_expected", "quiet", "no_color"]]
        near = difflib.get_close_matches(unknown.partition("=")[0], known, n=1) if unknown.startswith("-") else []
        parser.error(f"unrecognized argument {unknown}" + (f"; did you mean {near[0]}?" if near else ""))
    if rest:
        args.specs += rest
    return args


def build_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser. `arguments` say whether zoo's own options, and so its module, are needed."""
    parser = argparse.ArgumentParser(
        prog="lmconform", allow_abbrev=False,
        description="Conformance and regression suite for causal language models: what does not hold, where, and why.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"lmconform {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    check = commands.add_parser(
        "check", help="check models", description=CHECK_HELP, epilog=CHECK_EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    check.add_argument("specs", nargs="+", metavar="SPEC", help="what to check")
    for name, words in FLAGS.items():
        _add_option(check, name, words)
    check.add_argument(
        "--write-expected", metavar="FILE",
        help="draft an expected-failure file of what is red now; reasons are left empty, and refused until filled",
    )  # fmt: skip
    check.add_argument("--quiet", action="store_true", help="show findings, warnings and verdicts only")
    check.add_argument("--no-color", action="store_true", help="plain text (NO_COLOR does the same)")
    check.set_defaults(run=_check)

    listing = commands.add_parser("list", help="list the checks", allow_abbrev=False)
    lookup.add_list_arguments(listing)
    listing.set_defaults(run=lookup.list_main)

    explain = commands.add_parser(
        "explain",
        help="say what a check holds and how it measures, or what a cause is and how to mend it",
        allow_abbrev=False,
    )
    lookup.add_explain_arguments(explain)
    explain.set_defaults(run=lookup.explain_main)

    zoo = commands.add_parser("zoo", help="check every causal architecture of transformers", allow_abbrev=False)
    if arguments[:1] == ["zoo"]:
        from lmconform import zoo as module

        module.add_arguments(zoo)
        zoo.set_defaults(run=module.main)

    sweep = commands.add_parser(
        "sweep", help="train with many learning rates at once", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    if arguments[:1] == ["sweep"]:
        from lmconform.sweep import command

        command.add_arguments(sweep)
        sweep.set_defaults(run=command.main)

    bench = commands.add_parser(
        "bench", help="time a model against a peer", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    if arguments[:1] == ["bench"]:
        from lmconform.bench import command as benching

        benching.add_arguments(bench)
        bench.set_defaults(run=benching.main)

    snapshot = commands.add_parser(
        "snapshot", help="keep what a model does in a file", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    compare = commands.add_parser(
        "compare", help="compare a model with its snapshot", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    if arguments[:1] in (["snapshot"], ["compare"]):
        from lmconform.snapshots import command as snapshots

        snapshots.add_snapshot_arguments(snapshot)
        snapshot.set_defaults(run=snapshots.snapshot_main)
        snapshots.add_compare_arguments(compare)
        compare.set_defaults(run=snapshots.compare_main)

    report = commands.add_parser("report", help="make an HTML page of JSON reports", allow_abbrev=False)
    if arguments[:1] == ["report"]:
        from lmconform.report import command as pages

        pages.add_arguments(report)
        report.set_defaults(run=pages.main)
    return parser


def _add_option(parser: argparse.ArgumentParser, name: str, words: Mapping[str, Any]) -> None:
    """One option of lmconform.options.Options. Nothing is stored unless it is given."""
    given: dict[str, Any] = {**words, "dest": name, "default": argparse.SUPPRESS}
    default = HERE_BY_DEFAULT.get(name, NAMES[name].default)
    match words.get("action"):
        case "store_true":
            given["action"] = argparse.BooleanOptionalAction
            given["help"] += " (the default)" if default else ""
        case "append":
            given["help"] += "; repeatable, or separated by commas"
    if "choices" in words:
        given["help"] += f" (default: {default})"
    parser.add_argument("--" + name.replace("_", "-"), **given)


def _options(args: argparse.Namespace) -> Options:
    """The command line over [tool.lmconform] over the defaults. Raises OptionError."""
    values = {**HERE_BY_DEFAULT, **read_ini(Path.cwd())}
    for name, words in FLAGS.items():
        if hasattr(args, name):
            value = getattr(args, name)
            values[name] = ",".join(value) if words.get("action") == "append" else value
    return make_options(values)


# -- check -------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of one SPEC: `error` where there is no verdict."""

    spec: str
    report: Report
    code: int
    error: str = ""


def _check(args: argparse.Namespace) -> int:
    from lmconform.report import terminal

    options = _options(args)
    specs = list(dict.fromkeys(args.specs))
    files = _json_files(specs, options.json)
    _refuse_early(options, [*files.values(), options.html, args.write_expected], args.write_expected)
    console = terminal.make_console(colour=not args.no_color)
    outcomes: list[Outcome] = []
    for spec in specs:
        with _terminable():
            outcome = _check_one(spec, options, console, quiet=args.quiet)
        outcomes.append(outcome)
        if outcome.code == INTERRUPTED:
            print("lmconform: interrupted; this is how far it got", file=sys.stderr)
            return INTERRUPTED
        if spec in files:
            outcome.report.to_json(files[spec])
    if len(specs) > 1:
        terminal.show_summary(console, [(o.code == OK, o.error or terminal.verdict(o.report)) for o in outcomes])
    if options.html:
        from lmconform.report.html import render

        write_whole(options.html, render([outcome.report for outcome in outcomes]))
    if args.write_expected:
        _write_expected(args.write_expected, outcomes)
    return max(outcome.code for outcome in outcomes)


def _json_files(specs: Sequence[str], pattern: str | None) -> dict[str, str]:
    """SPEC to file. Raises OptionError where several subjects would share one."""
    if not pattern:
        return {}
    if len(specs) > 1 and "{subject}" not in pattern:
        raise OptionError(
            f"--json {pattern} would hold {len(specs)} subjects; put {{subject}} into the name, as in "
            "report-{subject}.json"
        )
    files: dict[str, str] = {}
    for spec in specs:
        name = re.sub(r"[^\w.-]+", "-", spec).strip("-.")
        file = pattern.replace("{subject}", name)
        files[spec] = pattern.replace("{subject}", f"{name}-{len(files) + 1}") if file in files.values() else file
    return files


def _refuse_early(options: Options, files: Sequence[str | None], new: str | None) -> None:
    """Say what is wrong with the options before any subject is built, once."""
    require_writable(*files)
    if new and Path(new).exists():
        raise OptionError(f"--write-expected {new}: it exists, and is never overwritten")
    if options.html:
        from lmconform.report.html import require_libraries

        require_libraries()
    if options.known:
        known_deviations()
    if not options.import_:  # a module that is imported first may register checks: then only the child knows them all
        chosen_case(options, select_checks(options.profile, options.select, options.deselect))
        if options.expected:
            read_expected(options.expected)


def _check_one(spec: str, options: Options, console: Console, *, quiet: bool) -> Outcome:
    from lmconform.report import terminal

    started = time.monotonic()
    results: list[Result] = []
    interrupted = False
    error: Exception | None = None
    backend: Child | Session | None = None
    with ExitStack() as stack:
        try:
            with terminal.progress(console, spec) as show:
                announce: Callable[[str], None] = lambda text: print(f"{spec}: {text}", file=sys.stderr)  # noqa: E731
                if options.isolate:
                    backend = stack.enter_context(Child(spec, options, announce))
                else:
                    backend = Session(spec, options, announce)
                _run(backend, results, show)
        except KeyboardInterrupt:
            interrupted = True
        except (BuildError, WorkerFailure) as raised:
            error = raised
        report = _report(backend, spec, options, results, error)
    if error is not None:
        return _not_built(spec, report, error)
    terminal.show_report(console, report, spec=spec, seconds=time.monotonic() - started, quiet=quiet)
    code = INTERRUPTED if interrupted else OK if report.ok else FINDINGS
    failures = backend.failures if isinstance(backend, Child) else []
    if failures and not interrupted:
        print(f"{spec}: lmconform itself failed\n{failures[0]}", file=sys.stderr)
        code = INTERNAL
    return Outcome(spec, report, code)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the stack, as Ctrl-C does, so that the child is ended too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(backend: Child | Session, results: list[Result], show: Callable[[str, int, int], None]) -> None:
    backend.open()

    def run(check: Any) -> Result:
        show(check.id, len(results), len(backend.checks))
        return backend.run(check)

    for result in run_all(run, backend.checks, budget=backend.options.time_budget):
        results.append(result)


def _report(
    backend: Child | Session | None, spec: str, options: Options, results: list[Result], error: Exception | None
) -> Report:
    if backend is not None:
        report = backend.report(results)
    else:
        report = Report(
            subject=spec, profile=options.profile, device=options.device, dtype=options.dtype or "native",
            seed=options.seed, versions=versions(), strict=options.strict,
        )  # fmt: skip
    if error is not None:
        report.died = f"not built: {_reason(spec, report.subject, error)}"
    return report


def _not_built(spec: str, report: Report, error: Exception) -> Outcome:
    reason = _reason(spec, report.subject, error)
    sys.stdout.flush()
    print(f"{spec} could not be built: {reason}", file=sys.stderr)
    for note in getattr(error, "__notes__", []):
        print(f"  {note}", file=sys.stderr)
    if isinstance(error, WorkerFailure):
        print(error.trace, file=sys.stderr)
    code = INTERNAL if isinstance(error, WorkerFailure) else USAGE
    return Outcome(spec, report, code, f"{spec} could not be built: {reason.partition(chr(10))[0]}")


def _reason(spec: str, name: str, error: Exception) -> str:
    """The error's text without the subject's name in front: the line begins with the SPEC already."""
    text = str(error)
    for known in (spec, name, spec.rpartition(":")[2]):
        text = text.removeprefix(f"{known}: ")
    return text


def _write_expected(file: str, outcomes: Sequence[Outcome]) -> None:
    drafts = [draft(outcome.spec, outcome.report.results) for outcome in outcomes]
    header = "\n".join(drafts[0].splitlines()[:2]) + "\n"
    text = header + "".join(each.removeprefix(header) for each in drafts)
    write_whole(file, text)
    count = text.count("[[expected]]")
    entries = "1 entry" if count == 1 else f"{count} entries"
    print(f"{file}: {entries}; write the reasons, then check with --expected {shlex.quote(file)}")


def _refuse(text: str) -> int:
    print(f"lmconform: {text}", file=sys.stderr)
    return USAGE
