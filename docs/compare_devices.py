"""Compares verdicts between devices: python docs/compare_devices.py (on a CUDA machine: sim against cuda).

Every sound fixture and every planted placement and precision fault, in sessions on each device. Prints a table; the
exit code is 1 where two devices disagree on a check that applies to both. By default all devices that are there.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

Verdicts = dict[str, str]


def of_fixture(name: str, device: str, profile: str) -> Verdicts:
    """Status of each check on a sound fixture."""
    import torch

    from fixtures.subjects import build
    from lmconform import Subject, check_model

    subject = Subject(lambda: build(name, torch.initial_seed() % (1 << 31)), name=name)
    report = check_model(subject, profile=profile, device=device)
    return {result.id: result.status.value for result in report.results}


def of_fault(name: str, device: str) -> Verdicts:
    """Status of each check that the fault is planted for, or that the subject could not be built there."""
    from fixtures.faults import all_faults
    from lmconform import BuildError
    from lmconform.registry import get_check
    from lmconform.runner import Runner

    fault = next(fault for fault in all_faults() if fault.id == name)
    try:
        runner = Runner(fault.subject().open(device=device))
    except BuildError:
        return dict.fromkeys(fault.kills, "cannot be built")
    return {check: runner.run(get_check(check)).status.value for check in fault.kills}


def row(name: str, found: dict[str, Verdicts], seconds: dict[str, float], devices: list[str]) -> tuple[str, bool]:
    """One line of the table, and whether the devices agree (cpu is shown beside them, and may differ on faults)."""
    judged = [device for device in devices if device != "cpu"] or devices
    first = found[judged[0]]
    differing = sorted(
        check
        for check in first
        if len({found[device][check] for device in judged} - {"not_applicable"}) > 1  # nothing is compiled on sim
    )
    cells = []
    for device in devices:
        statuses = list(found[device].values())
        counted = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
        cells.append(f"{counted} ({seconds[device]:.1f} s)")
    verdict = "same" if not differing else "DIFFER: " + ", ".join(differing)
    return f"| {name} | {' | '.join(cells)} | {verdict} |", not differing


def _named(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def main() -> int:
    import torch

    from fixtures.faults import all_faults
    from fixtures.subjects import SOUND
    from lmconform.devices import DeviceError, require

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    real = [name for name in there if there[name]]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", default=",".join(["cpu", "sim", *real]))
    parser.add_argument("--profile", default="default")
    parser.add_argument("subjects", nargs="*", help="fixtures and faults, or globs of them (default: all)")
    args = parser.parse_args()
    devices = args.devices.split(",")
    try:
        for device in devices:
            require(device)
    except DeviceError as error:
        parser.error(str(error))
    faults = [fault.id for fault in all_faults() if fault.id.startswith(("placement.", "precision."))]
    subjects = [name for name in [*SOUND, *faults] if not args.subjects or _named(name, args.subjects)]
    if not subjects:
        parser.error(f"no fixture and no placement or precision fault is called {' or '.join(args.subjects)}")
    print(f"| subject | {' | '.join(devices)} | verdicts |")
    print("| --- " * (len(devices) + 2) + "|")
    agree = True
    for name in subjects:
        found: dict[str, Verdicts] = {}
        seconds: dict[str, float] = {}
        for device in devices:
            started = time.perf_counter()
            found[device] = of_fault(name, device) if name in faults else of_fixture(name, device, args.profile)
            seconds[device] = time.perf_counter() - started
        line, same = row(name, found, seconds, devices)
        print(line, flush=True)
        agree = agree and same
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
