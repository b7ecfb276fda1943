"""The suite's seconds on nine architectures, of one revision against this tree: python docs/measure_suite.py

    python docs/measure_suite.py --before REV     # go on where docs/suite_seconds.json ends, then write the table
    python docs/measure_suite.py                  # write the table alone, to the terminal

Every run is a process of its own: it imports, builds the subject, checks it once with two cheap checks so that what is
imported on the way is loaded, and then measures the processor time of one whole `check_model` on one thread. Revisions
take turns, and so do the subjects; the table has the median of the rounds. A later revision may have more checks,
so the seconds of the checks that both ran stand beside those of the whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
FIGURES = HERE / "suite_seconds.json"
SUBJECTS = ("gpt2", "llama", "gpt_neox", "bloom", "mpt", "mistral", "gemma2", "mixtral", "mamba")
TRAINED = ("training", "collapse")
SUITES: dict[str, dict[str, Any]] = {  # the arguments of check_model
    "smoke": {"profile": "smoke"},
    "default, nothing trained": {"profile": "default", "deselect": TRAINED},
    "default": {"profile": "default"},
}
CHILD = """
import json, sys, time

import torch
from lmconform import check_model

torch.set_num_threads(1)
time.perf_counter = time.process_time  # so that every check's seconds are the processor's, too
subject, options = sys.argv[1], json.loads(sys.argv[2])
check_model(subject, select=["contract.shape", "contract.finite"])
started = time.process_time()
report = check_model(subject, **options)
seconds = time.process_time() - started
print(json.dumps({"seconds": seconds, "checks": {
    result.id: [result.status, result.seconds] for result in report.results
}}))
"""


def measured(tree: Path, subject: str, suite: str) -> dict[str, Any]:
    """One run of a suite, of the lmconform that lies in `tree`."""
    variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", CHILD, f"transformers:{subject}", json.dumps(SUITES[suite])]
    done = subprocess.run(command, cwd=tree, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{suite} on {subject} in {tree} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(figures: dict[str, Any], revision: str, rounds: int, minutes: float, suites: list[str]) -> None:
    """Fill in what the figures lack of so many rounds; end after so many minutes."""
    ends = time.monotonic() + 60 * minutes
    if figures.setdefault("before", revision) != revision:
        raise SystemExit(f"{FIGURES} compares with {figures['before']}; remove it to compare with {revision}")
    figures["versions"] = _versions()
    with tempfile.TemporaryDirectory() as name:
        before = Path(name) / "before"
        subprocess.run(["git", "clone", "-q", "--shared", str(HERE.parent), str(before)], check=True)
        subprocess.run(["git", "checkout", "-q", revision], cwd=before, check=True)
        trees = {"before": before, "after": HERE.parent}
        for suite in suites:
            for number in range(rounds):
                for subject in SUBJECTS:
                    runs = figures.setdefault("runs", {}).setdefault(suite, {}).setdefault(subject, {})
                    turns = list(trees)[:: -1 if number % 2 else 1]
                    for side in turns:
                        if len(runs.setdefault(side, [])) > number or time.monotonic() > ends:
                            continue
                        runs[side].append(measured(trees[side], subject, suite))
                        FIGURES.write_text(json.dumps(figures) + "\n")
                    if all(len(runs[side]) > number for side in turns):
                        print(suite, subject, *(f"{runs[side][number]['seconds']:.2f}" for side in trees), flush=True)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")}


RAN = ("passed", "failed", "warned", "xfailed")


def table(figures: dict[str, Any]) -> str:
    """Markdown: processor seconds before and after, whole and over the checks that ran in both."""
    lines = [
        f"Before: {figures['before']}. "
        + ", ".join(f"{name} {number}" for name, number in figures["versions"].items()),
        "",
        "| suite | subject | whole run, s | checks run | checks that both ran, s | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for suite, subjects in figures["runs"].items():
        for subject, runs in subjects.items():
            if not all(runs.get(side) for side in ("before", "after")):
                continue
            sides = [runs["before"], runs["after"]]
            ran = [{id for id, (status, _) in side[0]["checks"].items() if status in RAN} for side in sides]
            both = ran[0] & ran[1]
            whole = [median(run["seconds"] for run in side) for side in sides]
            shared = [median(sum(run["checks"][id][1] for id in both) for run in side) for side in sides]
            lines.append(
                f"| {suite} | {subject} | {whole[0]:.2f} → {whole[1]:.2f} | {len(ran[0])} → {len(ran[1])} "
                f"| {shared[0]:.2f} → {shared[1]:.2f} | {shared[1] / shared[0]:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--before", metavar="REV", help="measure against this revision of the repository")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further run after so long")
    parser.add_argument("--suites", nargs="*", choices=SUITES, default=list(SUITES))
    args = parser.parse_args()
    figures: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if args.before:
        measure(figures, args.before, args.rounds, args.minutes, args.suites)
    if not figures:
        parser.error(f"{FIGURES} does not exist: measure with --before REV")
    print(table(figures))


if __name__ == "__main__":
    main()
