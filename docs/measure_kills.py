"""Measures which check sees which planted fault, and whether the diagnosis names it: python docs/measure_kills.py.

Measuring and ranking are apart. Measuring runs every check on every fault (tens of minutes) and appends one line for
each fault to --json FILE; a run that was cut short is taken up again where it stopped. Ranking reads such a file
(--rank-from FILE) and writes docs/kills.md in seconds.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.faults import Fault
    from lmconform.runner import Runner

COSTLY = ("training", "collapse", "distributed", "peft")  # run on faults that concern them
FROM_THE_MODEL = (  # families that look at the module alone, whatever recipe or tokenizer comes with it
    "contract", "causality", "batching", "padding", "positions", "cache", "embeds", "gradients", "init", "scale",
    "persistence", "placement", "precision", "config",
)  # fmt: skip
RED = ("failed", "warned", "error")
SOUND, PAIR = "sound.", "pair."
PAIRS = 70  # pairs that hide one another are left out; 50 must remain  # rows of the sound hosts themselves


def chosen(fault: Fault, profile: str) -> list[str]:
    """The checks to run on a fault: of the costly families those that must see it, and what looks at its recipe."""
    from lmconform.registry import select_checks

    concerned = {check.partition(".")[0] for check in fault.kills} & {"training", "collapse"}
    ids = [
        check.id
        for check in select_checks(profile)
        if check.family not in COSTLY or (concerned and check.family in concerned and "recipe" in check.needs)
    ]
    return ids + [check for check in fault.kills if check not in ids]


def opened(fault: Fault, seed: int, profile: str) -> Runner:
    """A runner on the planted host. Nothing is shrunk: a smaller case is for people, and takes seconds a check."""
    import torch

    from lmconform.runner import Runner

    torch.set_num_threads(1)
    return Runner(fault.open(seed), profile=profile, seed=seed, shrink=False)


def measured(id: str, seed: int, profile: str, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every check's result on one planted fault (`sound.HOST`: on the host itself).

    `known` are the sound hosts' results: a fault that is planted in the recipe or the tokenizer leaves what looks at
    the module alone as it is.
    """
    from fixtures.faults import intact
    from lmconform.registry import get_check
    from lmconform.results import Result

    fault = planted(id)
    started = time.perf_counter()
    runner = opened(fault, seed, profile)
    results: list[Result] = []
    borrowed = known.get(fault.host, {}) if fault.plant is intact and not id.startswith(SOUND) else {}
    for check in chosen(fault, profile):
        if check in borrowed and check.partition(".")[0] in FROM_THE_MODEL and check not in fault.kills:
            results.append(Result.from_dict(borrowed[check]))
            runner.remember(results[-1])
        else:
            results.append(runner.run(get_check(check)))
    seconds = time.perf_counter() - started
    row = {
        "fault": id, "host": fault.host, "seed": seed, "profile": profile, "seconds": seconds,
        "results": [result.to_dict() for result in results],
    }  # fmt: skip
    return row


def pairs(many: int = PAIRS) -> dict[str, tuple[Fault, Fault]]:
    """Two faults of one host at once, by rule: ordered by hash, each goes with the next one that has another cause.

    Only faults of the module itself, planted in place; those that must be built otherwise do not compose.
    """
    from fixtures.faults import all_faults, intact

    found: dict[str, tuple[Fault, Fault]] = {}
    waiting: dict[str, Fault] = {}
    for fault in sorted(all_faults(), key=lambda fault: digest(fault.id)):
        kinds = {check.partition(".")[0] for check in fault.kills}
        if fault.plant is intact or fault.reference or fault.recipe or fault.tokenizer or kinds & {*COSTLY, "parity"}:
            continue
        other = waiting.get(fault.host)
        if other is None:
            waiting[fault.host] = fault
        elif other.cause != fault.cause:
            del waiting[fault.host]
            found[f"{PAIR}{other.id}+{fault.id}"] = (other, fault)
    return dict(list(found.items())[:many])


def both(one: Fault, other: Fault) -> Callable[[Any], Any]:
    """Plants both."""

    def plant(module: Any) -> Any:
        module = one.plant(module) or module
        return other.plant(module) or module

    return plant


def digest(text: str) -> str:
    """The same on every machine, with no order to it."""
    return hashlib.sha256(text.encode()).hexdigest()


def planted(id: str) -> Fault:
    """The fault of that id; `sound.HOST` plants nothing."""
    from fixtures.faults import Fault, all_faults, intact

    if id.startswith(SOUND):
        return Fault(id, id.removeprefix(SOUND), intact, (), "", "", "")
    if id.startswith(PAIR):
        one, other = pairs()[id]
        return Fault(id, one.host, both(one, other), (*one.kills, *other.kills), "", "", "two faults at once")
    return next(fault for fault in all_faults() if fault.id == id)


def measure(ids: list[str], file: Path, seed: int, profile: str, jobs: int, minutes: float = float("inf")) -> bool:
    """Append a line for each of these faults that the file does not hold yet; sound hosts come first.

    False where the minutes were over before all were measured: the next call goes on there.
    """
    from fixtures.faults import all_faults

    ends = time.monotonic() + 60 * minutes
    rows = read(file)
    known: dict[str, dict[str, Any]] = {}
    for host in sorted({fault.host for fault in all_faults()}):
        if SOUND + host not in rows:
            rows[SOUND + host] = append(file, attempted(SOUND + host, seed, profile, {}))
        known[host] = {result["id"]: result for result in rows[SOUND + host]["results"]}
    left = [id for id in ids if id not in rows]
    task = functools.partial(attempted, seed=seed, profile=profile, known=known)
    with get_context("spawn").Pool(jobs, maxtasksperchild=60) as pool:
        for number, found in enumerate(pool.imap(task, left), 1):
            row = append(file, found)
            red = [result["id"] for result in row.get("results", ()) if result["status"] in RED]
            print(f"{number}/{len(left)} {row['fault']} {row.get('seconds', 0):.1f} s: "
                  f"{row.get('error') or ', '.join(red)}", flush=True)  # fmt: skip
            if time.monotonic() > ends:
                return number == len(left)
    return True


def attempted(id: str, seed: int, profile: str, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`measured`, or the reason why it could not be: one fault does not end the run."""
    try:
        return examined(measured(id, seed, profile, known))
    except Exception as error:
        return {"fault": id, "error": f"{type(error).__name__}: {error}"}


def append(file: Path, row: dict[str, Any]) -> dict[str, Any]:
    if "error" not in row:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
    return row


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file by fault; the last line of a fault counts."""
    if not file.exists():
        return {}
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return {row["fault"]: row for row in rows}


def examined(row: dict[str, Any]) -> dict[str, Any]:
    """What the probes find on top of a measured row, and how long the diagnosis takes."""
    from kill_figures import results_of

    from lmconform.diagnosis import diagnose
    from lmconform.diagnosis.differential import examine
    from lmconform.global_state import global_state_kept

    results = results_of(row)
    runner = opened(planted(row["fault"]), row["seed"], row["profile"])
    with global_state_kept():  # some faults change the default type, and the next fault runs in this process
        runner.subject.noise  # noqa: B018  the checks have measured it before the diagnosis starts
    started = time.perf_counter()
    evidence = examine(results, runner)
    probed = time.perf_counter() - started
    started = time.perf_counter()
    diagnose(results)
    seconds = probed + time.perf_counter() - started
    findings = [[finding.cause, finding.verdict.value, finding.where] for finding in evidence.findings]
    return row | {"findings": findings, "diagnosis_seconds": seconds}


def main() -> None:
    from fixtures.faults import all_faults

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", default="default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="faults whose id holds this text")
    parser.add_argument("--json", type=Path, help="measure, and append the rows to this file")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so long; go on another time")
    parser.add_argument("--probe", action="store_true", help="run the probes again on what --json holds")
    parser.add_argument("--rank-from", type=Path, metavar="FILE", help="write the page from the rows in this file")
    parser.add_argument("--output", type=Path, default=HERE / "kills.md")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.json:
        ids = [*(fault.id for fault in all_faults()), *pairs()]
        ids = [id for id in ids if options.only in id]
        ids.sort(key=digest)  # a run that was cut short has seen some of everything
        if options.probe:
            for id, row in read(options.json).items():
                if id in ids:  # some rows may be of faults or pairs that are no more
                    append(options.json, examined(row))
        else:
            measure(ids, options.json, options.seed, options.profile, options.jobs, options.minutes)
    if options.rank_from:
        from kill_page import page

        text = page(read(options.rank_from), pairs(), "python docs/measure_kills.py --rank-from ROWS")
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
