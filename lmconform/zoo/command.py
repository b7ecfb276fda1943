"""`lmconform zoo`: its options, and what becomes of the rows.

This process imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lmconform.expected import ExpectedError, known_deviations
from lmconform.flags import PROFILES
from lmconform.options import OptionError, require_writable
from lmconform.registry import UnknownCheck, select_checks
from lmconform.results import EXECUTED, SCHEMA_VERSION, write_whole
from lmconform.zoo.client import Refused, Server, ServerError
from lmconform.zoo.journal import Journal, ResumeError, differences, journal_of, read_earlier, source_digest
from lmconform.zoo.rows import Row, idle_entries, totals

DEFAULTS: dict[str, Any] = {"profile": "smoke", "select": [], "deselect": [], "device": "cpu", "seed": 0, "known": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lmconform zoo`. Those a verdict depends on default to the resumed run's."""
    parser.description = "Check every causal architecture of transformers, shrunk, each in a process of its own."
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types or globs of them (default: all)")
    parser.add_argument(
        "--jobs", type=_count, default=cores(), metavar="N", help="types at once (default: %(default)s)"
    )
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="ray: spread the types over a Ray cluster"
    )
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="a running cluster's, or auto (default: one is started here)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON; finished rows are kept beside it")
    parser.add_argument("--parquet", metavar="FILE", help="write the rows as Parquet too (needs the extra: ray)")
    parser.add_argument("--html", metavar="FILE", help="write the rows as one HTML page, with filters")
    parser.add_argument(
        "--resume", metavar="FILE", help="go on with the run whose --json was FILE: only types without a row are run"
    )
    parser.add_argument("--profile", choices=PROFILES, help="how much is run (default: smoke)")
    parser.add_argument(
        "--select", action="append", metavar="ID", help="only these checks: ids, families or globs (repeatable)"
    )
    parser.add_argument(
        "--deselect", action="append", metavar="ID", help="not these checks: ids, families or globs (repeatable)"
    )
    parser.add_argument(
        "--device", help="where the models run: cpu, cuda, cuda:1, mps, or pretended: sim, sim:2 (default: cpu)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of weights and tokens (default: 0)")
    parser.add_argument(
        "--no-known", dest="known", action="store_false", default=None, help="show known deviations of transformers red"
    )
    parser.add_argument(
        "--timeout", type=_positive, default=120.0, metavar="SECONDS", help="kill a type after (default: 120)"
    )
    parser.add_argument(
        "--memory", type=_positive, default=4.0, metavar="GIB", help="memory a type may take (default: 4)"
    )


def main(args: argparse.Namespace) -> int:
    """Exit code 0: no red, nothing stale, something ran; 1: findings; 2: usage; 3: our own error."""
    try:
        return _run(args)
    except (OptionError, UnknownCheck, ResumeError, Refused) as error:
        print(f"lmconform zoo: {error}", file=sys.stderr)
        return 2
    except (ServerError, ExpectedError) as error:
        print(f"lmconform zoo: {error}", file=sys.stderr)
        return 3


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from lmconform.zoo.table import Progressing, print_rows, totals_line

    started = time.monotonic()
    if not hasattr(os, "fork"):
        raise OptionError("this system cannot fork processes; check one type with lmconform check transformers:TYPE")
    earlier, rows = read_earlier(Path(args.resume)) if args.resume else ({}, [])
    report = _report_path(args)
    if args.html:
        from lmconform.report.html import require_libraries

        require_libraries()
        require_writable(args.html)
    settings = _settings(args, earlier)
    known = known_deviations() if settings["known"] else []
    checks = select_checks(settings["profile"], settings["select"], settings["deselect"])
    if not checks:
        raise OptionError(f"no check is left of profile {settings['profile']} after --select and --deselect")
    if args.parquet:
        from lmconform.zoo.parquet import writable, write_parquet

        writable(Path(args.parquet))
    console = Console() if sys.stdout.isatty() else Console(width=160, soft_wrap=True)
    with _engine(args) as server:
        patterns = args.types or earlier.get("patterns", [])
        types = choose_types(patterns, server.types)
        versions = {**server.versions, "lmconform": f"{server.versions.get('lmconform', '')}+{source_digest()}"}
        run = {"patterns": patterns, **settings, "versions": versions}
        rows, said = _taken_over(args.resume, earlier, rows, run, types)
        for line in said:
            console.print(line, markup=False, highlight=False)
        waiting = [type for type in types if type not in {row.type for row in rows}]
        console.print(
            f"{len(waiting)} types, {len(checks)} checks ({settings['profile']}), "
            f"{args.jobs} at once; transformers {versions.get('transformers')}, torch {versions.get('torch')}",
            highlight=False,
        )
        journal = Journal(report, run, rows) if report else None
        try:
            with Progressing(console, len(types), len(rows)) as progress:
                for event in server.run(waiting, settings, args) if waiting else ():
                    if event["event"] == "started":
                        progress.start(event["type"])
                    else:
                        row = Row.from_dict(event["row"])
                        rows.append(row)
                        if journal:
                            journal.add(row)
                        progress.end(row)
        except KeyboardInterrupt:
            _say_interrupted(len(rows), len(types), report)
            return 130
        finally:
            if journal:
                journal.close()
    rows.sort(key=lambda row: row.type)
    sums = totals(rows, time.monotonic() - started, cores(), args.jobs)
    notes = [*said, *(idle_entries(rows, known, server.types) if not args.types else [])]
    print_rows(console, rows)
    for note in notes[len(said) :]:
        console.print(note, markup=False, highlight=False)
    console.print(totals_line(sums), style="bold", highlight=False)
    data = _data(run, sums, rows, notes)
    if args.html:
        from lmconform.report.html import render_zoo

        write_whole(args.html, render_zoo(data))
    if report:
        write_whole(report, json.dumps(data, indent=1) + "\n")
        journal_of(report).unlink()
    if args.parquet:
        write_parquet(Path(args.parquet), run, rows)
    if any(row.own_error for row in rows):
        print("lmconform zoo: lmconform itself failed in a type above", file=sys.stderr)
        return 3
    ran = any(sums["checks"].get(status) for status in EXECUTED)
    return 0 if ran and not sums["red"] and not sums["stale"] else 1


def _engine(args: argparse.Namespace) -> Any:
    """What runs the types: `types`, `versions` and `run(types, settings, args)`, within a `with` block."""
    if args.engine == "local":
        if args.ray_address:
            raise OptionError("--ray-address is for --engine ray")
        return Server()
    from lmconform.zoo.ray_engine import RayEngine

    return RayEngine(args.jobs, args.ray_address)


def _report_path(args: argparse.Namespace) -> Path | None:
    """Where the rows go, known to be writable before minutes are spent. Raises OptionError."""
    given = args.json or args.resume
    if not given:
        return None
    path = Path(given)
    if path.is_dir():
        raise OptionError(f"--json {path}: is a directory")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OptionError(f"--json {path}: cannot write into {path.parent}")
    return path


def _settings(args: argparse.Namespace, earlier: dict[str, Any]) -> dict[str, Any]:
    """The options a verdict depends on: as given, else as the resumed run had them, else the defaults."""
    settings: dict[str, Any] = {}
    for name, default in DEFAULTS.items():
        given = getattr(args, name)
        settings[name] = earlier.get(name, default) if given is None else given
    for name in ("select", "deselect"):
        settings[name] = " ".join(settings[name]).replace(",", " ").split()
    return settings


def choose_types(patterns: list[str], types: list[str]) -> list[str]:
    """The types that names and globs stand for, all without any. Raises OptionError with the nearest names."""
    if not patterns:
        return list(types)
    chosen: set[str] = set()
    for pattern in patterns:
        name = pattern.removeprefix("transformers:")
        found = fnmatch.filter(types, name)
        if not found:
            near = difflib.get_close_matches(name, types, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise OptionError(f"no causal model type of transformers is called {pattern!r}{hint}")
        chosen.update(found)
    return [type for type in types if type in chosen]


def _taken_over(
    file: str | None, earlier: dict[str, Any], rows: list[Row], run: dict[str, Any], types: list[str]
) -> tuple[list[Row], list[str]]:
    """The earlier rows that stand, and what the user should know about it."""
    if file is None:
        return [], []
    if reasons := differences(earlier, run):
        return [], [f"resuming {file}: none of its {len(rows)} rows taken over, they were made under other terms:"] + [
            f"  {reason}" for reason in reasons
        ]
    asked = [row for row in rows if row.type in types]
    kept = [row for row in asked if not row.cut_short and not row.own_error]
    again = [row.type for row in asked if row.cut_short or row.own_error]
    said = [f"resuming {file}: {len(kept)} of {len(types)} rows taken over, same versions and options"]
    if again:
        said.append(f"  run again, because they did not come to their end: {', '.join(again)}")
    return kept, said


def _say_interrupted(done: int, total: int, report: Path | None) -> None:
    way = f"go on with: lmconform zoo --resume {report}" if report else "nothing is kept without --json FILE"
    print(f"\nlmconform zoo: interrupted after {done} of {total} types; {way}", file=sys.stderr)


def _data(run: dict[str, Any], sums: dict[str, Any], rows: list[Row], notes: list[str]) -> dict[str, Any]:
    """What --json holds, and the page shows."""
    from lmconform import SPEC_VERSION

    return {
        "schema_version": SCHEMA_VERSION,
        "spec_version": SPEC_VERSION,
        "run": run,
        "totals": sums,
        "notes": notes,
        "rows": [row.to_dict() for row in rows],
    }


def cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return number
