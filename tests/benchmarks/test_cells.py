"""Forward, backward, prefill, decoding and generation of every encoding and of adaptive, beside transformers' own model
of the same shape.

    pytest tests/benchmarks/test_cells.py --benchmark-only -k "alibi or of_transformers"
    pytest tests/benchmarks/test_cells.py --benchmark-only -k "124m and rope"

One table a workload and base. Without --benchmark-only those of the own decoder run once, so that a broken benchmark is
seen; the others are slow. Ratios with an interval: `lmconform bench`.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest

from fixtures.subjects import sized
from lmconform import Subject
from lmconform.bench.shapes import SHAPES
from lmconform.bench.workloads import WORKLOADS
from lmconform.specimen import Specimen

ASKED = "--benchmark-only" in sys.argv
OF_TRANSFORMERS = "of_transformers"
BATCH, TIME, NEW = 2, 64, 16

KINDS = {base: [OF_TRANSFORMERS, *sized.kinds(base)] for base in sized.BASES}
SUBJECTS = [
    pytest.param(
        base,
        kind,
        shape,
        id=f"{base}-{kind}-{shape}",
        marks=[] if base == "llama" and kind.startswith("own_") and shape == "tiny" else [pytest.mark.slow],
    )
    for shape in ("tiny", "124m")
    for base in sized.BASES
    for kind in KINDS[base]
    if kind != "plain"
]


@functools.lru_cache(maxsize=1)
def opened(base: str, kind: str, shape: str) -> Specimen:
    """The subject, kept while its workloads are timed: pytest runs them one after another."""
    if kind == OF_TRANSFORMERS:
        built = functools.partial(sized.base_model, base, SHAPES.get(shape))
    else:
        built = getattr(sized, f"{base}_{kind}_{shape}")
    return Subject(built, name=f"{base} {kind} {shape}").open(as_loaded=True)


@pytest.mark.parametrize(("base", "kind", "shape"), SUBJECTS, scope="module")
@pytest.mark.parametrize("cell", WORKLOADS)
def test_cell(benchmark: Any, base: str, kind: str, shape: str, cell: str) -> None:
    benchmark.group = f"{cell}, {base}, {shape}"
    subject = opened(base, kind, shape)
    task = WORKLOADS[cell](subject, subject.probe_ids(BATCH, TIME), NEW)
    rounds = (20 if shape == "tiny" else 5) if ASKED else 1
    benchmark.extra_info["parameters"] = sum(parameter.numel() for parameter in subject.module.parameters())
    benchmark.pedantic(task.run, setup=lambda: (task.prepare(), {}), rounds=rounds, warmup_rounds=int(ASKED))
    subject.module.zero_grad(set_to_none=True)
