"""Reports made by hand, so that the pages of any outcome can be looked at without a model."""

from __future__ import annotations

from typing import Any

from lmconform.charts import curves, table
from lmconform.results import Cause, Report, Result, Status
from lmconform.zoo.rows import Row, totals

HOSTILE = "\"><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'><a href='javascript:1'>"
LONG = "a_name_without_any_place_to_break_" * 8
EVIDENCE = [
    {"check": "cache.failed", "measured": 3.0, "allowed": 1.0},
    {"check": "padding.error", "measured": float("inf"), "allowed": None},
    {"check": "elsewhere.seen"},
]
LEAK = table(
    "Which token each position feels", "token s", "logits at t",
    [[1.0 if s <= t + (t % 2) else 0.0 for s in range(6)] for t in range(6)], future=True, case="time=6,mask=none",
)  # fmt: skip
ERROR = curves(
    "Error by position", "position", "error", {"largest difference": [0.0, 1e-7, 3e-7, 2.0]}, bound=1e-5, log="y"
)
RATES = curves(
    "Loss by learning rate", "learning rate", "loss", {"at the end": [4.0, 1.0, float("inf")]}, x=[1e-4, 1e-3, 1e-2],
    log="x", marks={"recommended": 1e-3}, span=("good range", 5e-4, 2e-3),
)  # fmt: skip


def made(*results: Result, name: str = "toy", **more: Any) -> Report:
    return Report(name, "smoke", "cpu", "float32", 0, {"python": "3"}, list(results), **more)


def result(id: str, status: str, margin: float | None = None, message: str = "", **more: Any) -> Result:
    family = id.partition(".")[0]
    given = {"measured": margin, "allowed": 1.0, "margin": margin} if margin is not None else {}
    return Result(id, family, "fault", Status(status), message=message, seconds=0.1, **given, **more)


def of_every_status(text: str = "said in words") -> Report:
    """One check of each status; `text` stands wherever a subject can put text of its own."""
    lines = f"{text}: measured 3, allowed 1 (3 times the bound)\nwhere: {text}\nsmallest case: {text}\n{text}"
    charts = {"failed": (LEAK, ERROR), "warned": (ERROR,), "passed": (RATES,)}
    results = [
        result(
            f"cache.{status}" if status == "failed" else f"padding.{status}", status.value, 3.0, lines,
            repro=f"lmconform check '{text}'", charts=charts.get(status.value, ()),
        )
        for status in Status
    ]  # fmt: skip
    causes = [
        Cause("mask.missing", 0.75, text, EVIDENCE, text, text, text),
        Cause("mask.soft", 0.25, text, [], text, text, text),
    ]
    return made(*results, name=text, causes=causes, notes=[text])


def zoo_data(count: int = 180, text: str = "said in words") -> dict[str, Any]:
    """What --json of a zoo run of so many types holds: every ninth is red, every third triaged."""
    rows = []
    for number in range(count):
        row = Row(f"type{number:03}", "green", counts={"passed": 5})
        if number % 9 == 0:
            row.status, row.failed, row.reason = "red", ["cache.decode"], text
            row.repro = {"cache.decode": f"lmconform check '{text}'"}
        elif number % 3 == 0:
            row.status, row.xfailed, row.reason = "triaged", ["padding.left"], text
        row.messages = {id: text for id in (*row.failed, *row.xfailed)}
        rows.append(row)
    rows[-1].status, rows[-1].reason, rows[-1].output = "unreached", text, text
    run = {"profile": "smoke", "select": [], "deselect": [], "device": "cpu", "seed": 0, "known": True, "versions": {}}
    return {
        "schema_version": 1, "spec_version": 1, "run": run, "totals": totals(rows, 60.0, 2, 2), "notes": [text],
        "rows": [row.to_dict() for row in rows],
    }  # fmt: skip
