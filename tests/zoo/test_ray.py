"""`lmconform zoo --engine ray`: the same rows from a Ray cluster, whatever becomes of its workers."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from lmconform.zoo import add_arguments, command, main
from lmconform.zoo.ray_engine import RayEngine

TYPES = ["bloom", "gemma3n", "gpt2", "llama"]  # gemma3n needs timm: unreached
SELECT = ["causality", "cache.decode"]


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def verdicts(rows: list[dict[str, object]]) -> dict[object, object]:
    return {row["type"]: (row["status"], row["counts"], row["failed"]) for row in rows}


def test_a_killed_worker_loses_nothing() -> None:
    settings = {**command.DEFAULTS, "select": SELECT}
    args = parsed("--jobs", "2")
    with RayEngine(2, None) as engine:
        events = engine.run(TYPES, settings, args)
        seen = [next(events), next(events)]
        assert [event["event"] for event in seen] == ["started", "started"]
        os.kill(engine.pids[0], signal.SIGKILL)
        spread = [event["row"] for event in events if event["event"] == "row"]
    assert len(spread) == len(TYPES)
    with command.Server() as server:
        here = [event["row"] for event in server.run(TYPES, settings, args) if event["event"] == "row"]
    assert verdicts(spread) == verdicts(here)
    assert {row["type"] for row in here if row["status"] == "green"} == {"bloom", "gpt2", "llama"}


@pytest.mark.slow
def test_the_whole_zoo_is_the_same_with_a_worker_killed_half_way() -> None:
    args = parsed("--jobs", "2")
    spread: list[dict[str, object]] = []
    with RayEngine(2, None) as engine:
        for event in engine.run(engine.types, dict(command.DEFAULTS), args):
            if event["event"] != "row":
                continue
            spread.append(event["row"])
            if len(spread) == len(engine.types) // 2:
                os.kill(engine.pids[0], signal.SIGKILL)
    with command.Server() as server:
        events = server.run(server.types, dict(command.DEFAULTS), args)
        here = [event["row"] for event in events if event["event"] == "row"]
    assert len(spread) == len(here) > 150
    assert verdicts(spread) == verdicts(here)


def test_rows_reach_the_parquet_file(tmp_path: Path) -> None:
    from pyarrow import parquet

    file, report = tmp_path / "zoo.parquet", tmp_path / "zoo.json"
    given = ["gpt2", "--select", "cache.decode", "--json", str(report), "--parquet", str(file)]
    assert main(parsed(*given)) == 0
    table = parquet.read_table(file)
    (row,) = table.to_pylist()
    assert row["type"] == "gpt2"
    assert json.loads(row["counts"]) == {"passed": 1}
    run = json.loads(table.schema.metadata[b"lmconform"])
    assert run == json.loads(report.read_text())["run"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ray-address", "auto"], "--ray-address is for --engine ray"),
        (["--parquet", "/nowhere/rows.parquet"], "cannot write into /nowhere"),
    ],
)
def test_usage(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(parsed("gpt2", *arguments)) == 2
    assert says in capsys.readouterr().err


def test_without_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(parsed("gpt2", "--engine", "ray")) == 2
    assert "pip install 'lmconform[ray]'" in capsys.readouterr().err
