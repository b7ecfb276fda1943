"""Forward and cached generation against transformers' model of the same shape, paired:

    python tests/benchmarks/positional_ratio.py [ROUNDS]

The encoding under test and transformers' own model take turns within one process (lmconform.bench), in CPU time of its
one thread, which other processes disturb least; the figure is the median over rounds of (ours / theirs). Below 1 is
faster. `own` is our decoder in that base's shape.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from fixtures.subjects import sized
from lmconform import Subject
from lmconform.bench.cells import measure
from lmconform.bench.clocks import PROCESSOR
from lmconform.bench.shapes import Shape
from lmconform.bench.workloads import Sizes
from models.positional import METHODS

SHAPE = Shape(vocabulary=1000, width=256, layers=4, heads=8, hidden=1024, context=512)
CELLS = {"forward": Sizes(4, 128, 1), "generate": Sizes(4, 32, 24)}


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    print("| model | against | " + " | ".join(METHODS) + " |")
    print("| --- | --- |" + " --- |" * len(METHODS))
    for name in sized.BASES:
        base = sized.base_model(name, SHAPE)
        peer = Subject(base, name=name).open(as_loaded=True)
        for kind, make in (("graft", sized.grafted), ("own", sized.own)):
            row = []
            for method in METHODS:
                subject = Subject(make(base, method), name=f"{kind} {method}").open(as_loaded=True)
                found = [measure(subject, peer, sizes, [cell], rounds, PROCESSOR)[0] for cell, sizes in CELLS.items()]
                row.append(" / ".join(f"{cell.comparison.ratio:.2f}" if cell.comparison else "-" for cell in found))
            print(f"| {kind} | {name} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
