"""What checking costs as a model grows: smoke's seconds and memory against depth, width, context and vocabulary.

    python docs/cost_growth.py            # measures what docs/cost.json lacks, then writes docs/cost.md
    python docs/cost_growth.py --again depth_8

A Llama of each shape is built and checked in a process of its own; figures are that process' processor time, and its
resident memory at most during each check beyond what it held with the model built. Nothing is extrapolated.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from lmconform.bench.memory import ALLOCATOR, resident, resident_peak  # noqa: E402
from lmconform.bench.shapes import SHAPES, Shape, of_transformers  # noqa: E402

if TYPE_CHECKING:
    from lmconform.registry import Check

HANGS = 3600.0  # seconds; the usual limit would cut off what a large model takes on a busy machine
FIGURES = HERE / "cost.json"
BASE = Shape(vocabulary=1000, width=64, layers=2, heads=4, hidden=256, context=128)
SOUND = ("passed", "not_applicable")
POINTS: dict[str, Shape] = {
    "base": BASE,
    **{f"depth_{layers}": replace(BASE, layers=layers) for layers in (8, 32)},
    **{f"width_{w}": replace(BASE, width=w, heads=w // 16, hidden=4 * w) for w in (256, 1024)},
    **{f"context_{context}": replace(BASE, context=context) for context in (1024, 8192, 131_072)},
    **{f"vocabulary_{count}": replace(BASE, vocabulary=count) for count in (32_000, 128_000)},
    "124m": SHAPES["124m"],
    "350m": Shape(width=1024, layers=24, heads=16, hidden=2816, vocabulary=32_000, context=2048),
    "1b": Shape(width=2048, layers=16, heads=32, hidden=5632, vocabulary=32_000, context=2048),
}


def measured(name: str) -> dict[str, Any]:
    """Build that point here and run smoke on it, check by check."""
    import torch

    from lmconform import Subject, check_model
    from lmconform.options import Options
    from lmconform.session import Session

    torch.set_num_threads(1)
    check_model(of_transformers("llama", replace(BASE, vocabulary=100)), profile="smoke")  # what is imported on the way
    shape = POINTS[name]
    options = Options(profile="smoke", timeout=HANGS)
    session = Session(Subject(lambda: of_transformers("llama", shape), name=name), options)
    started = time.process_time()
    specimen = session.open().subject
    opened, built = time.process_time() - started, resident()
    checks: dict[str, dict[str, Any]] = {}

    def run(check: Check) -> None:
        started = time.process_time()
        result = session.run(check)
        seconds, told = time.process_time() - started, "" if result.status == "passed" else result.message
        checks[check.id] = {"seconds": seconds, "status": str(result.status), "message": told}

    for check in session.checks:
        kept = resident() - built
        peak = kept + resident_peak(functools.partial(run, check))
        checks[check.id]["peak_bytes"] = peak
    return {
        "parameters": sum(parameter.numel() for parameter in specimen.module.parameters()),
        "weight_bytes": specimen.weight_bytes, "open_seconds": opened, "checks": checks,
    }  # fmt: skip


def measured_apart(name: str) -> dict[str, Any]:
    """The same in a process of its own, whose allocator gives back what is freed."""
    command = [sys.executable, __file__, "--child", name]
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def page(figures: dict[str, dict[str, Any]]) -> str:
    """docs/cost.md."""
    lines = [
        "# What checking costs as a model grows",
        "",
        "Written by `python docs/cost_growth.py` from `cost.json`: a Llama of each shape, float32, smoke profile, one",
        "thread. Seconds are processor time, imports apart, building the model and its copies included. Memory is what",
        "the process held at most beyond the built model, also in units of the model's weights.",
        "",
        "| shape | parameters | weights | seconds | beyond the model | most memory | most time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in POINTS:
        if name in figures:
            lines.append(_row(name, figures[name]))
    base = POINTS["base"]
    lines += [
        "",
        f"`base`: {base.width} wide, {base.layers} layers, {base.heads} heads, {base.hidden} hidden, {base.vocabulary} "
        f"tokens, context {base.context}.",
        "The other rows change what their name says"
        + "".join(f"; `{name}` is {_told(POINTS[name])}" for name in ("124m", "350m", "1b") if name in figures)
        + ".",
        "",
        "Checks that take more than one model's weights:",
        "",
    ]
    for name in POINTS:
        found = figures.get(name)
        if found:
            over = {
                id: check["peak_bytes"] / found["weight_bytes"]
                for id, check in found["checks"].items()
                if check["peak_bytes"] > found["weight_bytes"]
            }
            most = sorted(over.items(), key=lambda item: -item[1])[:4]
            told = ", ".join(f"`{id}` {times:.1f}" for id, times in most) or "none"
            lines.append(f"- {name}: {len(over)}; {told}")
    return "\n".join(lines) + "\n"


def _row(name: str, found: dict[str, Any]) -> str:
    checks = found["checks"]
    heaviest = max(checks, key=lambda id: checks[id]["peak_bytes"])
    slowest = max(checks, key=lambda id: checks[id]["seconds"])
    seconds = found["open_seconds"] + sum(check["seconds"] for check in checks.values())
    peak = checks[heaviest]["peak_bytes"]
    return (
        f"| {name} | {found['parameters']:,} | {found['weight_bytes'] / 2**20:.1f} MiB | {seconds:.1f} | "
        f"{peak / 2**20:.0f} MiB, {peak / found['weight_bytes']:.1f} models | `{heaviest}` | "
        f"`{slowest}` {checks[slowest]['seconds']:.1f} s |"
    )


def _told(shape: Shape) -> str:
    return (
        f"{shape.width} wide, {shape.layers} layers, {shape.heads} heads, {shape.hidden} hidden, {shape.vocabulary} "
        f"tokens, context {shape.context}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--again", nargs="*", choices=POINTS, default=[], help="measure these anew")
    parser.add_argument("--only", nargs="*", choices=POINTS, help="measure no others")
    parser.add_argument("--child", choices=POINTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args.child)))
        return
    figures: dict[str, dict[str, Any]] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name in args.only or POINTS:
        if name not in figures or name in args.again:
            found = measured_apart(name)
            if red := {id: check for id, check in found["checks"].items() if check["status"] not in SOUND}:
                id, check = red.popitem()
                sys.exit(f"{name} is not counted, {id} was {check['status']}: {check['message']}")
            figures[name] = found
            FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
            print(_row(name, figures[name]), flush=True)
    (HERE / "cost.md").write_text(page(figures))


if __name__ == "__main__":
    main()
