"""Several processes that hold one model: started here (two, on this machine), or those that torchrun has started.

The parent writes the weights and a job; every rank builds the subject for itself, under a seed of its own, and measures
in step with the others; rank 0 writes what came of it. A rank that dies or hangs is a finding, and takes no one along.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    from lmconform.context import Context
    from lmconform.specimen import Specimen

SECONDS = 90.0  # for building and measuring; below a check's own limit
WORLD = 2
PATIENCE = 40.0  # of one collective call: a rank that never comes
LAST_WORDS = 5.0  # for a process that took another along to be seen as ended
LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
BASE_MEMORY = 6 << 30  # bytes for Python, torch and transformers, with room
WRITING = ("--json", "--html", "--write-expected")  # options that only the first process of torchrun may follow
ONE_SIDED = Hint(
    "a collective call (all_reduce, barrier, broadcast) that not every rank makes waits for ever",
    "distributed.replicas_diverge",
)
UNBUILT = 7  # exit code of a rank that could not build the subject
START = """\
import json, sys
job = json.load(open(sys.argv[1]))
sys.path[:] = job["path"]
from lmconform.measuring.ranks import take_part
take_part(job, int(sys.argv[2]))
"""


def reason_against(subject: Specimen) -> str:
    """Why two processes cannot be started on this subject; empty where they can."""
    import torch.distributed as dist

    if not dist.is_available():
        return "this torch was built without torch.distributed"
    if not dist.is_gloo_available():
        return "this torch has no gloo backend"
    if under_torchrun():
        return ""
    if sys.platform == "win32":
        return "needs POSIX processes"
    if subject.device.type != "cpu":
        return f"two processes share no {subject.device.type} device; start it under torchrun, one device a process"
    return "" if recipe_to_build(subject) else (
        "needs a SPEC, or a builder that can be pickled, so that another process can build the model: a lambda or a "
        "function inside a function cannot be"
    )  # fmt: skip


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def follows() -> bool:
    """Whether this is a torchrun process other than the first: it takes part and says nothing."""
    return under_torchrun() and os.environ.get("RANK") != "0"


# -- in the parent -------------------------------------------------------------------------------------------------


def measure_together(subject: Specimen, ctx: Context, what: str) -> dict[str, Any]:
    """Run `lmconform.measuring.together.MEASURES[what]` in all ranks; what rank 0 found.

    Violation where a rank dies, raises or hangs; Unavailable where the model cannot be built elsewhere.
    """
    if under_torchrun():
        return _joined(subject, ctx, what)
    import torch

    with tempfile.TemporaryDirectory(prefix="lmconform-") as folder:
        place = Path(folder)
        build = recipe_to_build(subject)
        assert build is not None
        kind, content = build
        (place / "build.pkl").write_bytes(content)
        torch.save(subject.module.state_dict(), place / "state.pt")
        job = {
            "path": sys.path, "folder": folder, "what": what, "kind": kind, "seed": subject.seed, "world": WORLD,
            "draw": ctx.seed, "patience": PATIENCE, "dtype": str(subject.dtype),
            "memory": BASE_MEMORY + 24 * subject.weight_bytes,
        }  # fmt: skip
        subject._afford(24 * subject.weight_bytes + (1 << 30), "two processes, with copies,")
        (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run(ctx, place, WORLD)
        found: dict[str, Any] = torch.load(place / "answer.pt", weights_only=True)
        return found


def recipe_to_build(subject: Specimen) -> tuple[str, bytes] | None:
    """How another process builds it: by its SPEC, or as a pickled Subject with its builder, else with the module."""
    if subject.spec:
        return "spec", subject.spec.encode()
    from lmconform.subject import Subject

    owner = getattr(subject.builder, "__self__", None)
    given = owner.model_or_builder if isinstance(owner, Subject) else None
    for thing in (given, subject.module):
        if thing is None:
            continue
        try:
            content = pickle.dumps(Subject(thing, name=subject.name, call=subject.convention.call))
        except Exception:  # whatever a foreign object raises: it cannot be pickled, the next way is tried
            continue
        if b"__main__" not in content[:4000]:
            return "subject", content
    return None


def _run(ctx: Context, place: Path, world: int) -> None:
    """Start the ranks and wait until all have ended well. They end with this call, however it ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "")}
    if not environment["GLOO_SOCKET_IFNAME"]:
        del environment["GLOO_SOCKET_IFNAME"]
    ranks: list[subprocess.Popen[bytes]] = []
    files = [(place / f"rank{rank}.txt").open("wb") for rank in range(world)]
    try:
        for rank in range(world):
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", START, str(place / "job.json"), str(rank)],
                    stdin=subprocess.DEVNULL, stdout=files[rank], stderr=subprocess.STDOUT, env=environment,
                    start_new_session=True,
                )
            )  # fmt: skip
        _wait(ctx, place, ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for file in files:
            file.close()


def _wait(ctx: Context, place: Path, ranks: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        codes = [process.poll() for process in ranks]
        if all(code == 0 for code in codes):
            return
        bad = next((rank for rank, code in enumerate(codes) if code not in (None, 0)), None)
        if bad is not None:
            bad, code = _first_cause(place, ranks)
            _report(ctx, place, bad, code)
        if time.monotonic() > deadline:
            slow = [str(rank) for rank, code in enumerate(codes) if code is None]
            ctx.fail(
                f"two processes did not come to an end within {SECONDS:g} s: rank {' and '.join(slow)} still runs, "
                f"{_stage(place, int(slow[0]))}",
                hint=ONE_SIDED,
            )
        time.sleep(0.05)


def _first_cause(place: Path, ranks: list[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """The rank that ended badly for a reason of its own, and its code; one that only lost the other waits for it."""
    deadline = time.monotonic() + LAST_WORDS
    while True:
        codes = {rank: process.poll() for rank, process in enumerate(ranks)}
        ended = {rank: code for rank, code in codes.items() if code}
        own = [rank for rank in ended if not _lost_the_other(place, rank)]
        if own or time.monotonic() > deadline:
            first = next(iter(own or ended))
            return first, ended[first]
        time.sleep(0.05)


def _lost_the_other(place: Path, rank: int) -> bool:
    """Whether that rank only says that the other one went away: then the other one knows why."""
    refused = place / f"error{rank}.txt"
    if not refused.exists():
        return False
    said = refused.read_text(encoding="utf-8")
    return any(text in said for text in LOST)


def _report(ctx: Context, place: Path, rank: int, code: int | None) -> None:
    printed = (place / f"rank{rank}.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    refused = place / f"error{rank}.txt"
    last = refused.read_text(encoding="utf-8") if refused.exists() else (printed or ["(nothing printed)"])[-1][:300]
    if code == UNBUILT:
        ctx.not_applicable(f"another process cannot build it: {last}")
    stuck = any(word in last for word in ("Timed out", "timed out", "Timeout"))
    if refused.exists() and stuck:
        message = f"rank {rank} waited for the other in vain, {_stage(place, rank)}: {last}"
        hint = ONE_SIDED
    elif refused.exists():
        message = f"rank {rank} of two raised, {_stage(place, rank)}: {last}"
        hint = Hint(
            "it runs in one process; look at what is different there: sharded or wrapped modules, weights read outside "
            "the module that owns them, code that depends on the rank",
            "distributed.replicas_diverge",
        )
    else:
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        message = f"rank {rank} of two {how}, {_stage(place, rank)}: {last}"
        hint = Hint("")
    ctx.fail(message, hint=hint)


def _stage(place: Path, rank: int) -> str:
    file = place / f"stage{rank}.txt"
    return "while " + (file.read_text(encoding="utf-8") if file.exists() else "starting Python")


# -- in a rank -----------------------------------------------------------------------------------------------------


def take_part(job: dict[str, Any], rank: int) -> None:
    """One rank's whole life: build, join, measure; rank 0 writes answer.pt. Ends the process."""
    import datetime

    import torch
    import torch.distributed as dist

    place = Path(job["folder"])

    def stage(text: str) -> None:
        (place / f"stage{rank}.txt").write_text(text, encoding="utf-8")

    _limit_memory(job["memory"])
    torch.set_num_threads(1)
    try:
        stage("building the model")
        subject = _built(job, rank)
        state = torch.load(place / "state.pt", weights_only=True)
        if rank == 0 or job["what"] != "ddp":  # under DDP the other ranks must get rank 0's weights by its broadcast
            subject.module.load_state_dict(state)
    except Exception as error:
        (place / f"error{rank}.txt").write_text(f"{type(error).__name__}: {first_line(error)}", encoding="utf-8")
        sys.stdout.flush()
        os._exit(UNBUILT)
    try:
        from lmconform.measuring.together import MEASURES, alone

        subject, found = alone(subject, job["draw"], stage, job["world"])
        stage("joining the other rank")
        dist.init_process_group(
            "gloo", init_method=f"file://{place / 'meeting'}", rank=rank, world_size=job["world"],
            timeout=datetime.timedelta(seconds=job["patience"]),
        )  # fmt: skip
        found = MEASURES[job["what"]](subject, found, job["draw"], stage)
        if rank == 0:
            torch.save(found, place / "part.pt")
            (place / "part.pt").rename(place / "answer.pt")
        stage("leaving")
        dist.barrier()
        os._exit(0)  # nothing of the subject's may keep the process from ending
    except BaseException as error:
        import traceback

        traceback.print_exc()
        text = f"{type(error).__name__}: {first_line(error)}"
        (place / f"error{rank}.txt").write_text(text, encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _built(job: dict[str, Any], rank: int) -> Specimen:
    """The subject under a seed of this rank's own: what is not broadcast will differ."""
    import torch

    from lmconform.subject import Subject, as_subject

    content = (Path(job["folder"]) / "build.pkl").read_bytes()
    seed = job["seed"] + rank
    # a pickle written by our own parent, into a folder that it alone can write to
    given: Subject = as_subject(content.decode()) if job["kind"] == "spec" else pickle.loads(content)
    specimen = given.open(seed=seed, dtype=job["dtype"], as_loaded=True)
    set_experts = getattr(specimen.module, "set_experts_implementation", None)
    if specimen.dtype == torch.float64 and callable(set_experts):  # the grouped kernels take no float64
        set_experts("eager")
    return specimen


def _limit_memory(size: int) -> None:
    """A rank that runs away fails alone: the data segment counts what is really its own."""
    if importlib.util.find_spec("resource") is None:
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (size if hard < 0 else min(size, hard), hard))


_joined_before: set[str] = set()


def _joined(subject: Specimen, ctx: Context, what: str) -> dict[str, Any]:
    """Under torchrun: measure in this very process, in step with the others; only rank 0 judges."""
    import datetime

    import torch
    import torch.distributed as dist

    from lmconform.measuring.together import MEASURES, alone

    if what in _joined_before:
        raise Unavailable("under torchrun each check is measured once: the other processes have gone on")
    _joined_before.add(what)
    copied = subject.copy()
    cuda = subject.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        copied.module.to(f"cuda:{torch.cuda.current_device()}")
    world = int(os.environ["WORLD_SIZE"])
    copied, found = alone(copied, ctx.seed, lambda text: None, world)
    store, rank, world = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if cuda else "gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=PATIENCE),
        store=dist.PrefixStore(f"lmconform-{what}", store),  # the addresses of the last check's group stay in the store
    )  # fmt: skip
    try:
        found = MEASURES[what](copied, found, ctx.seed, lambda text: None)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if rank != 0:
        ctx.not_applicable("rank 0 judges")
    return found
