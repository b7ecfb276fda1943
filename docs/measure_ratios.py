"""The reference models against transformers' models of the same shape: python docs/measure_ratios.py

Runs `lmconform bench` for every pair that docs/ratios.json lacks (`--again PAIR` measures anew), in processor time of
one thread, and writes docs/ratios.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIGURES = HERE / "ratios.json"
CELLS = ("forward", "backward", "prefill", "decode", "generate")
VARIANTS = ("rope", "sinusoidal", "t5_relative", "diet", "alibi", "math_adaptive")
KINDS = {
    "tiny": [
        "gpt2_adaptive", "gpt2_plain", "gpt2_own_sinusoidal", "gpt_neox_own_rope", "gpt_neox_graft_alibi",
        *(f"llama_own_{variant}" for variant in VARIANTS), *(f"llama_graft_{variant}" for variant in VARIANTS),
    ],
    "124m": [
        "gpt2_adaptive", "llama_own_rope", "llama_own_alibi", "gpt_neox_own_rope", "llama_own_t5_relative",
        "llama_own_math_adaptive",
    ],
}  # fmt: skip
PAIRS = [f"{kind}_{shape}" for shape, kinds in KINDS.items() for kind in kinds]
SIZES = {
    "tiny": ["--batch", "2", "--time", "64", "--new-tokens", "16", "--repeats", "20"],
    "124m": ["--batch", "1", "--time", "32", "--new-tokens", "4", "--repeats", "6"],
}


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


def page(figures: dict[str, dict[str, Any]]) -> str:
    """docs/ratios.md."""
    lines = [
        "# Reference models against transformers",
        "",
        "Written by `python docs/measure_ratios.py`. Ratio of processor times, ours / transformers' model of the same",
        "shape, with its 95 % interval: below 1 is faster, **bold** where the whole interval lies above 1. `own`: our",
        "decoder; `graft`: transformers' with another position encoding; `adaptive`: GPT-2 with a gate on every head;",
        "`plain`: a module of plain PyTorch.",
    ]
    for shape, title in (("tiny", "Tiny (64 wide, 2 layers)"), ("124m", "The 124 M shape (768 wide, 12 layers)")):
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
    return "\n".join(lines) + "\n"


def _told(cell: dict[str, float]) -> str:
    text = f"{cell['ratio']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"
    return f"**{text}**" if cell["low"] > 1 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--again", nargs="*", choices=PAIRS, default=[], metavar="PAIR", help="measure these anew")
    parser.add_argument("--only", nargs="*", choices=PAIRS, metavar="PAIR", help="measure no others")
    args = parser.parse_args()
    figures: dict[str, dict[str, Any]] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for pair in args.only or PAIRS:
        if pair not in figures or pair in args.again:
            figures[pair] = measured(pair)
            FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
            (HERE / "ratios.md").write_text(page(figures))
            print(pair, *(f"{name} {_told(cell)}" for name, cell in figures[pair]["cells"].items()), flush=True)
    (HERE / "ratios.md").write_text(page(figures))


if __name__ == "__main__":
    main()
