"""`lmconform list` and `lmconform explain`: what the registry says of checks, and the catalogue of causes."""

from __future__ import annotations

import argparse

from lmconform.cases import Span
from lmconform.diagnosis.catalogue import CauseEntry, catalogue
from lmconform.diagnosis.ranking import RELIABILITY
from lmconform.flags import PROFILES
from lmconform.registry import CAPABILITIES, Check, UnknownCheck, all_checks, select_checks, unknown_id


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lmconform list`."""
    parser.add_argument("--profile", choices=PROFILES, default="thorough", help="only what this profile runs")
    parser.add_argument("patterns", nargs="*", metavar="ID", help="ids, families or globs")


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lmconform explain`."""
    parser.add_argument("id", metavar="ID", help="a check, a cause, or a family")


def list_main(args: argparse.Namespace) -> int:
    """Exit code 0. A table on a terminal, else one line a check. Raises UnknownCheck."""
    from rich.table import Table

    from lmconform.report.terminal import make_console

    console = make_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("check", "profile", "needs"):
        table.add_column(title, no_wrap=True)
    table.add_column("holds when", overflow="fold")
    checks = select_checks(args.profile, args.patterns)
    for check in checks:
        name = f"{check.id} (w)" if check.severity == "warning" else check.id
        table.add_row(name, check.profile, " ".join(check.needs), check.holds)
    if not console.is_terminal:  # one line a check, for grep
        for check in checks:
            print(f"{check.id:32} {check.profile:9} {check.holds}")
        return 0
    console.print(table)
    console.print(f"\n{len(checks)} checks; (w) only warns; lmconform explain ID says more")
    return 0


def explain_main(args: argparse.Namespace) -> int:
    """Exit code 0. Raises UnknownCheck, which suggests the nearest ids."""
    from lmconform.report.terminal import make_console

    console = make_console()
    checks, causes = all_checks(), catalogue()
    if args.id in checks or args.id in causes:
        lines = _explained(checks[args.id]) if args.id in checks else _explained_cause(causes[args.id])
        for title, text in lines:
            console.print(f"{title}: {text}" if title else text, markup=False, highlight=False)
        return 0
    family = [(check.id, check.holds) for check in checks.values() if check.family == args.id]
    family += [(f"cause {id}", cause.summary) for id, cause in causes.items() if id.partition(".")[0] == args.id]
    if not family:
        families = {id.partition(".")[0] for id in (*checks, *causes)}
        raise UnknownCheck(unknown_id(args.id, [*checks, *causes, *families], "check or cause"))
    for id, text in family:
        console.print(f"{id}: {text}", markup=False, highlight=False)
    return 0


def _explained_cause(cause: CauseEntry) -> list[tuple[str, str]]:
    by_reliability = sorted(cause.shows, key=lambda check: list(RELIABILITY).index(cause.shows[check]))
    lines = [
        ("", f"{cause.id}: {cause.summary}"),
        ("what it is", cause.explanation),
        ("confirm", cause.confirm.replace("{spec}", "SPEC")),
        ("mend", cause.mend),
        ("turns red", ", ".join(f"{check} ({cause.shows[check]})" for check in by_reliability)),
        ("leaves green", ", ".join(sorted(cause.spares))),
        ("easily taken for", ", ".join(cause.similar)),
        ("see", "; ".join(cause.references)),
    ]
    return [(title, text) for title, text in lines if text]


def _explained(check: Check) -> list[tuple[str, str]]:
    needs = [f"{need} ({CAPABILITIES[need]})" for need in check.needs]
    lines = [
        ("", check.id),
        ("holds when", check.holds),
        ("how", "\n" + check.doc if "\n" in check.doc else check.doc),
        ("profile", f"{check.profile} ({_including(check.profile)})"),
        ("severity", "a warning: fails only with --strict" if check.severity == "warning" else "a fault"),
        ("needs", ", ".join(needs) or "nothing beside logits"),
        ("blocked when this fails", ", ".join(check.requires) or "nothing"),
    ]
    if check.grid:
        lines.append(("cases", "; ".join(map(str, check.grid))))
        space = ", ".join(
            f"{key} {axis.low}..{axis.high}" if isinstance(axis, Span) else f"{key} {'|'.join(map(str, axis.values))}"
            for key, axis in (check.space or {}).items()
        )
        lines.append(("searched, when red", space))
    lines.append(("run it alone", f"lmconform check SPEC --select {check.id}"))
    return lines


def _including(profile: str) -> str:
    return "runs in " + ", ".join(PROFILES[PROFILES.index(profile) :])
