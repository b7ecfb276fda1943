"""Measures which check sees which planted fault: python docs/measure_kills.py.

Writes docs/kills.md, the kill matrix, and with --json FILE the raw verdicts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

RED = ("failed", "warned", "error")
COSTLY = ("training", "collapse", "distributed", "peft")  # run on faults that are theirs


def verdicts(id: str, seed: int, profile: str) -> dict[str, Any]:
    """Every check's verdict on one planted fault, and the causes the diagnosis ranks."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from fixtures.faults import all_faults
    from lmconform.diagnosis import diagnose
    from lmconform.registry import get_check, select_checks
    from lmconform.runner import Runner

    torch.set_num_threads(1)
    fault = next(fault for fault in all_faults() if fault.id == id)
    started = time.perf_counter()
    runner = Runner(fault.open(seed), profile=profile, seed=seed, shrink=False)
    wanted = {check.partition(".")[0] for check in fault.kills}
    checks = {
        check.id: check for check in select_checks(profile) if check.family not in COSTLY or check.family in wanted
    }
    checks |= {check: get_check(check) for check in fault.kills}
    results = [runner.run(check) for check in checks.values()]
    checked = time.perf_counter() - started
    causes = diagnose(results, runner)
    return {
        "fault": id,
        "host": fault.host,
        "cause": fault.cause,
        "mechanism": fault.mechanism,
        "kills": fault.kills,
        "seed": seed,
        "results": {r.id: [r.status.value, r.margin, r.message] for r in results},
        "causes": [[cause.id, cause.score, cause.where] for cause in causes],
        "seconds": checked,
        "diagnosis_seconds": time.perf_counter() - started - checked,
    }


def page(rows: list[dict[str, Any]], command: str, seconds: float) -> str:
    """The Markdown page."""
    from lmconform.registry import all_checks
    from lmconform.session import versions

    killers: dict[str, list[str]] = {check: [] for check in all_checks()}
    survivors = []
    for row in rows:
        red = [check for check, (status, *_) in row["results"].items() if status in RED]
        row["red"] = red
        for check in red:
            killers[check].append(row["fault"])
        if not red:
            survivors.append(row["fault"])
    first = sum(bool(row["causes"]) and row["causes"][0][0] == row["cause"] for row in rows)
    three = sum(row["cause"] in [cause for cause, *_ in row["causes"][:3]] for row in rows)
    known = ", ".join(f"{k} {v}" for k, v in versions().items())
    lines = [
        "# Kill matrix",
        "",
        f"Measured by `{command}` in {seconds:.0f} s on {os.cpu_count()} cores ({platform.machine()}); {known}.",
        "",
        f"{len(rows)} planted faults, {len(rows) - len(survivors)} seen. "
        f"First cause right: {first} ({first / len(rows):.0%}); "
        f"among the first three: {three} ({three / len(rows):.0%}).",
        "",
        *(f"- not seen: {fault}" for fault in survivors),
        "## Faults",
        "",
        "| fault | host | mechanism | red checks | cause | ranked first |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['fault']} | {row['host']} | {row['mechanism']} | {', '.join(row['red'])} | {row['cause']} "
            f"| {row['causes'][0][0] + ' ' + format(row['causes'][0][1], '.2f') if row['causes'] else 'none'} |"
            for row in rows
        ),
        "",
        "## Checks",
        "",
        "| check | faults it turns red | alone |",
        "| --- | --- | --- |",
        *(
            f"| {check} | {len(faults)} | {sum(row['red'] == [check] for row in rows)} |"
            for check, faults in killers.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    from fixtures.faults import all_faults

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", default="default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="faults whose id holds this text")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--output", type=Path, default=HERE / "kills.md")
    options = parser.parse_args()
    started = time.monotonic()
    ids = [fault.id for fault in all_faults() if options.only in fault.id]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(verdicts, id, options.seed, options.profile) for id in ids]
        for number, future in enumerate(futures):
            row = future.result()
            rows.append(row)
            print(f"{number + 1}/{len(ids)} {row['fault']}: {row['cause']} -> {row['causes'][:3]}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    command = f"python docs/measure_kills.py --seed {options.seed} --profile {options.profile}"
    options.output.write_text(page(rows, command, time.monotonic() - started), encoding="utf-8")


if __name__ == "__main__":
    main()
