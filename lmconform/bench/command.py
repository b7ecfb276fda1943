"""`lmconform bench`: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lmconform.bench.cells import Cell, measure
from lmconform.bench.pairing import ROUNDS
from lmconform.bench.workloads import WORKLOADS, Sizes
from lmconform.options import OptionError, require_writable
from lmconform.results import as_json, jsonable, write_whole
from lmconform.subject import BuildError

if TYPE_CHECKING:
    from rich.console import Console

    from lmconform.bench.clocks import Clock
    from lmconform.bench.memory import Order
    from lmconform.specimen import Specimen

SCHEMA_VERSION = 1
EPILOG = """\
A ratio is subject / peer, below 1 where the subject is faster; [low, high] holds it with 95 %. A cell is slower only
where the whole interval lies above --max-ratio: a noisy machine widens the interval and fails nobody.

exit codes: 0 timed, and nothing slower than --max-ratio; 1 something is; 2 wrong usage, no subject, or nothing to time
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lmconform bench`."""
    from lmconform.bench.shapes import NAMES, TINY

    sizes = Sizes()
    parser.description = "Time a model against a peer: in turns, in one process, as ratios with their intervals."
    parser.epilog = EPILOG
    parser.add_argument("spec", metavar="SPEC", help="the model, as for lmconform check")
    parser.add_argument("--against", required=True, metavar="SPEC", help="the peer")
    parser.add_argument(
        "--shape", choices=NAMES, default=TINY, help="of transformers:TYPE, on either side (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=sizes.batch, metavar="N", help="prompts (default: %(default)s)")
    parser.add_argument(
        "--time", type=int, default=sizes.time, metavar="N", help="tokens of a prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=sizes.new, metavar="N",
        help="tokens to decode and to generate (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--cells", default=",".join(WORKLOADS), metavar="NAMES", help="what is timed (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=ROUNDS, metavar="N",
        help="rounds of two runs of each (default: %(default)s; at least 6)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: %(default)s)")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall",
        help="on the CPU; processor time leaves out what other processes take (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default: cpu)")
    parser.add_argument("--dtype", help="float32, bfloat16, ... (default: each model's own)")
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory of every cell (the default)"
    )
    parser.add_argument("--max-ratio", type=float, metavar="X", help="exit code 1 where a cell is slower than X times")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help="import first")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a checkpoint that brings its own code")
    parser.add_argument("--json", metavar="FILE", help="write every timing, with the machine's facts and versions")


def main(args: argparse.Namespace) -> int:
    """Exit code 0: timed; 1: slower than --max-ratio; 2: usage, no subject, or nothing that both can do.

    With --max-ratio a cell in which the subject raises is 1 as well.
    """
    try:
        return _run(args)
    except (OptionError, BuildError) as error:
        print(f"lmconform bench: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    from lmconform.bench.intervals import fewest
    from lmconform.report.terminal import make_console

    for name, least in (("batch", 1), ("time", 2), ("new_tokens", 1), ("repeats", fewest(0.95)), ("threads", 1)):
        if getattr(args, name) < least:
            raise OptionError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")
    if args.max_ratio is not None and not args.max_ratio > 0:
        raise OptionError(f"--max-ratio {args.max_ratio:g}: a ratio of times, above 0")
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        raise OptionError(f"--device {args.device}: cpu and cuda are timed; a simulated device has no speed")
    names = _names(args.cells)
    require_writable(args.json)
    specs = (args.spec, args.against)
    _refuse_shape(args.shape, specs)

    from lmconform.bench.machine import facts
    from lmconform.loading import import_first

    for module in args.imports:
        import_first(module)
    with _threads(args.threads):
        subject, peer = (_opened(spec, args) for spec in specs)
        cells = measure(subject, peer, Sizes(args.batch, args.time, args.new_tokens), names, args.repeats, _clock(args))
        if args.memory:
            _add_peaks(cells, args, subject, peer)
        machine = facts()
    console = make_console()
    _show(console, args, cells, subject, peer)
    if args.json:
        write_whole(args.json, as_json(jsonable(_data(args, cells, subject, peer, machine))))
    timed = [cell for cell in cells if cell.comparison is not None]
    if not timed:
        raise OptionError("nothing was timed: " + "; ".join(f"{cell.name}: {cell.reason}" for cell in cells))
    return 1 if _slower(timed, args.max_ratio) or (args.max_ratio is not None and any(c.broken for c in cells)) else 0


def _names(given: str) -> list[str]:
    names = list(dict.fromkeys(filter(None, given.split(","))))
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown or not names:
        raise OptionError(f"--cells {given}: out of {', '.join(WORKLOADS)}, separated by commas")
    return names


def _refuse_shape(shape: str, specs: tuple[str, ...]) -> None:
    from lmconform.bench.shapes import PREFIX, TINY

    if shape != TINY and not any(spec.startswith(PREFIX) for spec in specs):
        raise OptionError(f"--shape {shape} is for {PREFIX}TYPE; {' and '.join(specs)} bring their own sizes")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _opened(spec: str, args: argparse.Namespace) -> Specimen:
    from lmconform.bench.shapes import shaped_subject

    subject = shaped_subject(spec, args.shape, trust_remote_code=args.trust_remote_code)
    specimen = subject.open(
        device=args.device,
        dtype=args.dtype,
        as_loaded=True,
        announce=lambda said: print(f"{spec}: {said}", file=sys.stderr),
    )
    new = args.new_tokens if {"decode", "generate"} & set(_names(args.cells)) else 0
    longest, wanted = specimen.context_length, args.time + new
    if longest is not None and wanted > longest:
        made = f"--time {args.time}" + (f" and --new-tokens {new} make {wanted} tokens" if new else "")
        raise OptionError(f"{made}; {spec} takes {longest}")
    return specimen


def _clock(args: argparse.Namespace) -> Clock:
    import torch

    from lmconform.bench.clocks import PROCESSOR, WALL, CudaEvents

    device = torch.device(args.device)
    if device.type == "cuda":
        return CudaEvents(device)
    return PROCESSOR if args.clock == "processor" else WALL


def _add_peaks(cells: list[Cell], args: argparse.Namespace, subject: Specimen, peer: Specimen) -> None:
    """Why there is no figure goes to stderr, once."""
    from lmconform.specimen import Unavailable

    timed = [cell for cell in cells if cell.comparison is not None]
    for side, spec, field in ((subject, args.spec, "peak"), (peer, args.against, "peer_peak")):
        try:
            peaks = _peaks(side, _order(spec, args, [cell.name for cell in timed]))
        except Unavailable as reason:
            print(f"no peak memory: {reason}", file=sys.stderr)
            return
        for cell in timed:
            setattr(cell, field, peaks.get(cell.name))


def _order(spec: str, args: argparse.Namespace, cells: list[str]) -> Order:
    from lmconform.bench.memory import Order

    return Order(
        spec=spec, shape=args.shape, cells=cells, batch=args.batch, time=args.time, new=args.new_tokens,
        dtype=args.dtype, threads=args.threads, imports=args.imports, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip


def _peaks(side: Specimen, order: Order) -> dict[str, int]:
    from lmconform.bench.memory import allocated_peak, resident_peaks

    if side.device.type != "cuda":
        return resident_peaks(order)
    found = {}
    for name in order.cells:
        task = WORKLOADS[name](side, side.probe_ids(order.batch, order.time), order.new)
        found[name] = allocated_peak(lambda task=task: task.run(*task.prepare()), side.device)  # type: ignore[misc]
        side.module.zero_grad(set_to_none=True)
    return found


def _slower(cells: list[Cell], most: float | None) -> list[Cell]:
    return [cell for cell in cells if most is not None and cell.comparison and cell.comparison.slower_than(most)]


def _parameters(side: Specimen) -> int:
    return sum(parameter.numel() for parameter in side.module.parameters())


def _show(console: Console, args: argparse.Namespace, cells: list[Cell], subject: Specimen, peer: Specimen) -> None:
    from rich.table import Table

    console.print(
        f"{subject.name} ({_parameters(subject):,} parameters) against {peer.name} ({_parameters(peer):,}): batch "
        f"{args.batch}, {args.time} tokens, {args.new_tokens} new; {args.device}, {args.threads} "
        f"thread{'s' if args.threads > 1 else ''}, {args.repeats} rounds",
        soft_wrap=True,
    )
    console.print()
    slower = _slower(cells, args.max_ratio)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in (subject.name, peer.name, "ratio", "95 %", *(["peak MiB", "peer's"] if args.memory else []), ""):
        table.add_column(title, justify="right" if title else "left")
    for cell in cells:
        if cell.comparison is None:
            continue
        found = cell.comparison
        memory = [_mebibytes(cell.peak), _mebibytes(cell.peer_peak)] if args.memory else []
        verdict = "slower" if cell in slower else "within" if args.max_ratio is not None else ""
        table.add_row(
            cell.name, f"{1000 * found.median:.3g} ms", f"{1000 * found.peer_median:.3g} ms", f"{found.ratio:.2f}",
            f"{found.low:.2f} to {found.high:.2f}", *memory, verdict,
        )  # fmt: skip
    console.print(table)
    for cell in cells:
        if cell.comparison is None:
            console.print(f"{cell.name}: not timed, {cell.reason}", soft_wrap=True)
    if slower:
        console.print()
        console.print(
            f"slower than {args.max_ratio:g} times {args.against}: "
            + ", ".join(f"{cell.name} ({cell.comparison})" for cell in slower),
            soft_wrap=True,
        )


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def _data(
    args: argparse.Namespace, cells: list[Cell], subject: Specimen, peer: Specimen, machine: dict[str, Any]
) -> dict[str, Any]:
    """The JSON: every timing in seconds, peaks in bytes."""
    sides = {
        role: {
            "spec": spec, "name": side.name, "parameters": _parameters(side), "dtype": str(side.dtype).split(".")[1],
        }
        for role, spec, side in (("subject", args.spec, subject), ("peer", args.against, peer))
    }  # fmt: skip
    slower = _slower(cells, args.max_ratio)
    rows = []
    for cell in cells:
        row: dict[str, Any] = {"name": cell.name, "reason": cell.reason}
        if cell.comparison is not None:
            row |= asdict(cell.comparison)
            row |= {"slower": cell in slower if args.max_ratio is not None else None}
            row |= {"peak_bytes": cell.peak, "peer_peak_bytes": cell.peer_peak}
        rows.append(row)
    return {
        "schema_version": SCHEMA_VERSION, **sides, "device": args.device, "shape": args.shape, "batch": args.batch,
        "time": args.time, "new_tokens": args.new_tokens, "rounds": args.repeats, "max_ratio": args.max_ratio,
        "ok": not slower and not any(cell.broken for cell in cells), "cells": rows, "machine": machine,
    }  # fmt: skip
