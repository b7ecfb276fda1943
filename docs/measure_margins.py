"""Measures how near the sound subjects come to the bounds: python docs/measure_margins.py --seeds 50.

Writes docs/margins.md: per check the largest margin (measured / allowed) over all sound fixtures and seeds, where it
was seen, whether any verdict changed from seed to seed, and whether the diagnosis blamed anybody. With --rows FILE
every run is kept as it ends, and the same command, given again, goes on where it stopped; where there are new checks,
it runs those alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

Row = tuple[str, str, float | None, float, str]  # check, status, margin, seconds, first line of the message
Run = tuple[str, int, list[Row], list[str]]  # subject, seed, rows, causes that the diagnosis named


def measure(name: str, seed: int, profile: str, select: tuple[str, ...]) -> Run:
    """One subject under one seed, on one thread: those checks."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from fixtures.subjects import build
    from lmconform import Subject, check_model

    torch.set_num_threads(1)
    subject = Subject(lambda: build(name, torch.initial_seed() % (1 << 31)), name=name)
    report = check_model(subject, profile=profile, seed=seed, select=select)
    rows = [(r.id, r.status.value, r.margin, r.seconds, r.message.partition("\n")[0]) for r in report.results]
    return name, seed, rows, [cause.id for cause in report.causes]


def kept(path: Path | None) -> list[Run]:
    """The runs of earlier calls; a last line that was cut off is dropped."""
    if path is None or not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [(name, seed, [tuple(row) for row in rows], causes) for name, seed, rows, causes in map(json.loads, whole)]


def joined(runs: list[Run]) -> list[Run]:
    """One run a subject and seed, of all that was measured of it."""
    together: dict[tuple[str, int], Run] = {}
    for name, seed, rows, causes in runs:
        *_, had, blamed = together.get((name, seed), (name, seed, [], []))
        together[name, seed] = (name, seed, [*had, *rows], [*blamed, *causes])
    return list(together.values())


def page(done: list[Run], command: str, seeds: int, seconds: float) -> str:
    """The Markdown page."""
    from lmconform.session import versions

    largest: dict[str, tuple[float, str, int]] = {}
    verdicts: dict[tuple[str, str], set[str]] = defaultdict(set)
    spent: dict[str, list[float]] = defaultdict(list)
    for name, seed, rows, _ in done:
        spent[name].append(sum(row[3] for row in rows))
        for check, status, margin, _, _ in rows:
            verdicts[name, check].add(status)
            if margin is not None and status == "passed" and margin >= largest.get(check, (-1.0, "", 0))[0]:
                largest[check] = (margin, name, seed)
    changed = {key: found for key, found in verdicts.items() if len(found) > 1}
    red = sorted({(n, c) for (n, c), found in verdicts.items() if found & {"failed", "error", "xpassed"}})
    known = ", ".join(f"{k} {v}" for k, v in versions().items())
    lines = [
        "# Margins on sound subjects",
        "",
        f"Measured by `{command}`: {len(verdicts)} pairs of "
        f"subject and check, {seeds} seeds each, {seconds:.0f} s of checks in all on {os.cpu_count()} cores "
        f"({platform.machine()}), one thread a subject; {known}.",
        "",
        f"Verdicts that changed from seed to seed: {len(changed)}. Red: {len(red)}. Runs in which the diagnosis named "
        f"a cause: {sum(bool(causes) for *_, causes in done)} of {len(done)}.",
        *(f"- {name} {check}: {', '.join(sorted(found))}" for (name, check), found in sorted(changed.items())),
        "",
        "Seconds for one run, imports aside (median over seeds): "
        + ", ".join(f"{name} {sorted(times)[len(times) // 2]:.1f}" for name, times in spent.items())
        + ".",
        "",
        "| check | largest margin of a green result | seen on |",
        "| --- | --- | --- |",
        *(f"| {check} | {margin:.3g} | {name}, seed {seed} |" for check, (margin, name, seed) in largest.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    from fixtures.subjects import SOUND
    from lmconform.registry import select_checks

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--profile", default="default")
    parser.add_argument("--minutes", type=float, default=120, help="start no further seed after so long")
    parser.add_argument("--deselect", default="", help="families or ids to leave out, separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--rows", type=Path, help="keep every run here, and do not repeat those that stand there")
    parser.add_argument("--output", type=Path, default=HERE / "margins.md")
    options = parser.parse_args()
    started = time.monotonic()
    left_out = tuple(filter(None, options.deselect.split(",")))
    done = kept(options.rows)
    have = {(name, seed): {row[0] for row in rows} for name, seed, rows, _ in joined(done)}
    selected = [check.id for check in select_checks(options.profile, (), left_out)]
    wanted = [
        (name, seed, missing)
        for seed in range(options.seeds)
        for name in SOUND
        if (missing := tuple(id for id in selected if id not in have.get((name, seed), set())))
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measure, name, seed, options.profile, missing) for name, seed, missing in wanted]
        for future in as_completed(futures):
            done.append(future.result())
            if options.rows is not None:
                with options.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done[-1]) + "\n")
            if time.monotonic() - started > options.minutes * 60:
                pool.shutdown(cancel_futures=True)
                break
    whole = [run for run in joined(done) if {row[0] for row in run[2]} >= set(selected)]
    count = Counter(run[1] for run in whole if run[1] < options.seeds)
    done = sorted(run for run in whole if count[run[1]] == len(SOUND))  # whole seeds only
    seeds = len(done) // len(SOUND)
    seconds = sum(row[3] for _, _, rows, _ in done for row in rows)
    command = f"python docs/measure_margins.py --seeds {options.seeds} --profile {options.profile}"
    command += f" --deselect {options.deselect}" if options.deselect else ""
    options.output.write_text(page(done, command, seeds, seconds), encoding="utf-8")
    for name, seed, rows, causes in done:
        if causes:
            print(name, seed, "blamed:", ", ".join(causes))
        for check, status, _, _, message in rows:
            if status in ("failed", "error", "warned", "blocked", "xpassed"):
                print(name, seed, check, status, message)


if __name__ == "__main__":
    main()
