"""The reference models against transformers' models of the same shape: python docs/measure_ratios.py

Runs `lmconform bench` for every pair that docs/ratios.json lacks (`--again PAIR` measures anew), in processor time of
one thread, and writes docs/ratios.md. What a profile said of cells above 1 is in docs/ratios.toml.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIGURES = HERE / "ratios.json"
EXPLANATIONS = HERE / "ratios.toml"
CELLS = ("forward", "backward", "prefill", "decode", "generate")
VARIANTS = ("rope", "sinusoidal", "t5_relative", "diet", "alibi", "math_adaptive")
KINDS = [
    *(f"llama_own_{variant}" for variant in VARIANTS), "gpt2_adaptive", "gpt2_story", "gpt_neox_staged_1",
    "gpt_neox_staged_3", "gpt_neox_quantum", "gpt_neox_quantum_interference", "gpt2_plain", "gpt2_own_sinusoidal",
    "gpt2_own_t5_relative", "gpt_neox_own_rope", "gpt_neox_own_alibi",
    *(f"{base}_graft_{variant}" for base in ("llama", "gpt_neox", "gpt2") for variant in VARIANTS),
]  # fmt: skip
PAIRS = [f"{kind}_{shape}" for shape in ("124m", "tiny") for kind in KINDS]
SIZES = {
    "tiny": ["--batch", "2", "--time", "64", "--new-tokens", "16", "--repeats", "20"],
    "124m": ["--batch", "1", "--time", "32", "--new-tokens", "4", "--repeats", "6"],
}
TITLES = {"tiny": "Tiny (64 wide, 2 layers)", "124m": "The 124 M shape (768 wide, 12 layers)"}


def command(pair: str) -> list[str]:
    """The arguments of `lmconform` that measure it."""
    shape = pair.rpartition("_")[2]
    base = next(base for base in ("gpt_neox", "gpt2", "llama") if pair.startswith(base))
    return [
        "bench", f"fixtures/subjects/sized.py:{pair}", "--against", f"transformers:{base}", "--shape", shape,
        "--clock", "processor", "--no-memory", *SIZES[shape],
    ]  # fmt: skip


def measured(pair: str) -> dict[str, Any]:
    """Ratio, low and high of every cell, with the load of the machine."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        arguments = [sys.executable, "-m", "lmconform", *command(pair), "--json", str(file)]
        subprocess.run(arguments, cwd=HERE.parent, env=environment, stdout=subprocess.DEVNULL, check=True)
        data = json.loads(file.read_text())
    cells = {
        cell["name"]: {key: round(cell[key], 4) for key in ("ratio", "low", "high")} | {"ms": _milliseconds(cell)}
        for cell in data["cells"]
        if not cell["reason"]
    }
    return {"cells": cells, "machine": data["machine"]}


def _milliseconds(cell: dict[str, Any]) -> list[float]:
    """Medians of the subject and of the peer."""
    return [round(1000 * sorted(cell[side])[len(cell[side]) // 2], 3) for side in ("seconds", "peer_seconds")]


def known() -> dict[str, dict[str, Any]]:
    """What has been measured so far, by pair."""
    found: dict[str, dict[str, Any]] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    return found


def told_above(figures: dict[str, dict[str, Any]]) -> list[str]:
    """The explanations that cells above 1 need, each with those cells, and the cells that none explains yet."""
    above = [
        (pair, name) for pair in PAIRS if pair in figures for name in CELLS if _above(figures[pair]["cells"].get(name))
    ]
    lines = []
    for entry in tomllib.loads(EXPLANATIONS.read_text())["above"]:
        named = [
            cell for cell in above if cell[1] in entry["cells"] and any(fnmatch(cell[0], p) for p in entry["pairs"])
        ]
        above = [cell for cell in above if cell not in named]
        if named:
            lines.append(f"- {_listed(named)}: {entry['why']}")
    if above:
        lines.append(f"- Not explained yet: {_listed(above)}.")
    return lines


def _listed(cells: list[tuple[str, str]]) -> str:
    by_pair: dict[str, list[str]] = {}
    for pair, name in cells:
        by_pair.setdefault(pair, []).append(name)
    return "; ".join(f"`{pair}` {', '.join(names)}" for pair, names in by_pair.items())


def page(figures: dict[str, dict[str, Any]]) -> str:
    """docs/ratios.md."""
    lines = [
        "# Reference models against transformers",
        "",
        "Written by `python docs/measure_ratios.py`. Ratio of processor times, ours / transformers' model of the same",
        "shape, with its 95 % interval: below 1 is faster, **bold** where the whole interval lies above 1. `own`: our",
        "decoder; `graft`: transformers' with another position encoding; `adaptive`: GPT-2 with a gate on every head;",
        "`staged_1` and `_3`: with time vectors, and with a closed graph; `plain`: a module of plain PyTorch.",
    ]
    for shape, title in TITLES.items():
        done = [pair for pair in PAIRS if pair.endswith(shape) and pair in figures]
        if not done:
            continue
        lines += ["", f"## {title}", "", f"    lmconform {' '.join(command(done[0]))}", ""]
        lines += ["| model | " + " | ".join(CELLS) + " |", "| --- |" + " --- |" * len(CELLS)]
        for pair in done:
            found = figures[pair]["cells"]
            cells = [_told(found[cell]) if cell in found else "-" for cell in CELLS]
            lines.append(f"| {pair.removesuffix('_' + shape)} | " + " | ".join(cells) + " |")
        loads = [figures[pair]["machine"]["load_average"] for pair in done]
        machine = figures[done[0]]["machine"]
        lines += [
            "",
            f"{machine['processor']}, {machine['cores_allowed']} cores of which one was used, load average "
            f"{min(loads)} to {max(loads)} meanwhile; "
            + ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name != "lmconform")
            + ".",
        ]
    if told := told_above(figures):
        lines += ["", "## Why above 1", "", *told]
    return "\n".join(lines) + "\n"


def _told(cell: dict[str, float]) -> str:
    text = f"{cell['ratio']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"
    return f"**{text}**" if _above(cell) else text


def _above(cell: dict[str, float] | None) -> bool:
    """Whether the whole interval lies there."""
    return cell is not None and cell["low"] > 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--again", nargs="*", choices=PAIRS, default=[], metavar="PAIR", help="measure these anew")
    parser.add_argument("--only", nargs="*", choices=PAIRS, metavar="PAIR", help="measure no others")
    args = parser.parse_args()
    for pair in args.only or PAIRS:
        if pair not in known() or pair in args.again:
            found = measured(pair)
            figures = known() | {pair: found}  # read again: another pair may have been measured meanwhile
            FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
            print(pair, *(f"{name} {_told(cell)}" for name, cell in found["cells"].items()), flush=True)
    (HERE / "ratios.md").write_text(page(known()))


if __name__ == "__main__":
    main()
