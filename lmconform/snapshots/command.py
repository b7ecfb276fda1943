"""`lmconform snapshot` and `lmconform compare`: their options, and what they print."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lmconform.options import OptionError
from lmconform.snapshots import SnapshotError
from lmconform.snapshots.names import file_name
from lmconform.subject import BuildError

if TYPE_CHECKING:
    from lmconform.snapshots.comparison import Comparison
    from lmconform.snapshots.store import Snapshot
    from lmconform.subject import Subject

SAME, DIFFERS, USAGE = 0, 1, 2
SNAPSHOT_EPILOG = """\
The file holds float64 figures of what the model does on fixed cases, with the tolerance of each measured on the spot.
Weights are drawn by lmconform, the same on every machine; --as-loaded keeps a checkpoint's own.

exit codes: 0 written; 2 the subject cannot be built, or FILE exists and --update was not given
"""
COMPARE_EPILOG = """\
exit codes: 0 the same; 1 something differs; 2 FILE is no snapshot, the subject cannot be built, or wrong usage
"""


def add_snapshot_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lmconform snapshot`."""
    parser.description = "Keep what a model does in a file, to compare with later."
    parser.epilog = SNAPSHOT_EPILOG
    parser.add_argument("spec", metavar="SPEC", help="the model, as for lmconform check")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="where to; a folder gives the name that --lm-snapshot wants",
    )
    parser.add_argument("--update", action="store_true", help="renew FILE, and show the differences that this accepts")
    parser.add_argument("--as-loaded", action="store_true", help="the weights as they are, not drawn ones")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and tokens (default: 0)")
    _shared(parser)


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lmconform compare`."""
    from lmconform.snapshots.comparison import KINDS

    parser.description = "Compare a model with its snapshot: what changed, where first, and how much."
    parser.epilog = COMPARE_EPILOG
    parser.add_argument("file", metavar="FILE", help="what lmconform snapshot wrote")
    parser.add_argument("spec", metavar="SPEC", help="the model as it is now")
    parser.add_argument(
        "--ignore", action="append", default=[], choices=KINDS[1:],
        help="tell of these changes without counting them: names, shapes, dtypes and ties of parameters and buffers "
        "(inventory), a checkpoint's numbers (weights); repeatable",
    )  # fmt: skip
    parser.add_argument("--json", metavar="OUT", help="write findings, every key's move, and notes")
    _shared(parser)


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help="import first")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a checkpoint that brings its own code")


def snapshot_main(args: argparse.Namespace) -> int:
    """Exit code 0: written; 2: not."""
    try:
        return _snapshot(args)
    except (OptionError, BuildError, SnapshotError) as error:
        return _refused("snapshot", error)


def compare_main(args: argparse.Namespace) -> int:
    """Exit code 0: the same; 1: something differs; 2: there is nothing to compare."""
    try:
        return _compare(args)
    except (OptionError, BuildError, SnapshotError) as error:
        return _refused("compare", error)


def _refused(command: str, error: Exception) -> int:
    print(f"lmconform {command}: {error}", file=sys.stderr)
    return USAGE


def _snapshot(args: argparse.Namespace) -> int:
    from lmconform.snapshots import store
    from lmconform.snapshots.comparison import unheld

    file = Path(args.output)
    if file.is_dir():
        file = file / file_name(args.spec)
    _writable(file)
    if file.exists() and not args.update:
        raise SnapshotError(
            f"{file} exists and is not overwritten; compare with it (lmconform compare {shlex.quote(str(file))} "
            f"{shlex.quote(args.spec)}), or say --update, which shows the differences it accepts"
        )
    old = store.read(file) if file.exists() else None
    subject = _subject(args)
    accepted = None if old is None else seen(old, subject)
    from lmconform.snapshots.taking import take

    snapshot = take(subject, seed=args.seed, as_loaded=args.as_loaded, announce=_announce)
    snapshot.write(file)
    if accepted is not None:
        print(told(accepted, f"{file}: renewed; the differences that this accepts:"))
        if old is not None and (old.seed, old.as_loaded) != (args.seed, args.as_loaded):
            print(f"  taken before with seed {old.seed}{' --as-loaded' if old.as_loaded else ''}")
    else:
        print(f"{file}: written")
    print(_summary(snapshot, file))
    for note in unheld(snapshot):
        print(f"  {note}")
    return SAME


def _compare(args: argparse.Namespace) -> int:
    from lmconform.results import write_whole
    from lmconform.snapshots import store

    snapshot = store.read(args.file)
    if args.json:
        _writable(Path(args.json))
    comparison = seen(snapshot, _subject(args), tuple(args.ignore))
    if args.json:
        write_whole(args.json, json.dumps(comparison.to_dict(), indent=1) + "\n")
    print(told(comparison, f"{args.spec} against {args.file}:"))
    if not comparison.ok:
        print(renewal(snapshot, args.spec, args.file))
    return SAME if comparison.ok else DIFFERS


def _subject(args: argparse.Namespace) -> Subject:
    from lmconform.loading import import_first
    from lmconform.subject import as_subject

    for module in args.imports:
        import_first(module)
    return as_subject(args.spec, trust_remote_code=args.trust_remote_code)


def seen(snapshot: Snapshot, subject: Subject, ignored: tuple[str, ...] = ()) -> Comparison:
    """The comparison of a snapshot with the subject as it is. Raises BuildError."""
    from lmconform.snapshots.comparison import compare
    from lmconform.snapshots.taking import observe

    return compare(snapshot, observe(subject, snapshot, announce=_announce), ignored=ignored)


def _announce(text: str) -> None:
    print(text, file=sys.stderr)


def _writable(file: Path) -> None:
    import os

    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise OptionError(f"{file}: {file.parent} is no folder that can be written to")
    if file.is_dir():
        raise OptionError(f"{file} is a folder; name a file")


# -- what is printed ---------------------------------------------------------------------------------------------------


def renewal(snapshot: Snapshot, spec: str, file: str | Path) -> str:
    """How to accept what differs."""
    more = " --as-loaded" * snapshot.as_loaded + (f" --seed {snapshot.seed}" if snapshot.seed else "")
    return f"If this is meant: lmconform snapshot {shlex.quote(spec)} -o {shlex.quote(str(file))} --update{more}"


def told(comparison: Comparison, heading: str) -> str:
    """The findings, what moved, notes and the verdict, for a terminal."""
    lines = []
    for finding in comparison.findings:
        first, *rest = finding.message.splitlines()
        aside = " (ignored)" if finding.kind in comparison.ignored else ""
        lines.append(f"{finding.kind}{aside}: {first}")
        lines += [f"    {line}" for line in rest]
    if changed := [move for move in comparison.moves if move.changed]:
        names = {move.key: f"{move.key} ({move.name})" if move.name else move.key for move in changed}
        width = max(map(len, names.values()))
        lines.append("what moved, and how far, of its size:")
        lines += [
            f"    {names[move.key]:{width}}  {len(move.rows):3} of {move.total:3}  {move.size:8.2g}  "
            f"allowed {move.allowed:.1g}"
            for move in changed
        ]
    lines += [f"note: {note}" for note in comparison.notes]
    kinds = list(dict.fromkeys(finding.kind for finding in comparison.counted))
    lines.append(
        f"differs: {', '.join(kinds) or 'nothing was compared'}" if not comparison.ok
        else f"the same: {comparison.compared} keys compared"
    )  # fmt: skip
    return "\n  ".join([heading, *lines])


def _summary(snapshot: Snapshot, file: Path) -> str:
    behaviour = snapshot.behaviour
    figures = sum(key.values.size for key in behaviour.keys.values())
    lines = [
        f"  {snapshot.subject}: {figures} figures of {len(behaviour.keys)} keys, computed in {snapshot.computed_in}, "
        f"{'weights as loaded' if snapshot.as_loaded else f'weights drawn under seed {snapshot.seed}'}, "
        f"{file.stat().st_size / 1024:.0f} KiB"
    ]
    lines += [f"  not in it: {case} ({reason})" for case, reason in behaviour.missing.items()]
    return "\n".join(lines)
