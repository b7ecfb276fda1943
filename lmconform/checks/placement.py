"""placement: what a model uses lies where the model is, whatever device that is."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lmconform.context import Hint, Violation
from lmconform.conventions import first_line
from lmconform.copies import cast, give_weights
from lmconform.measuring.exercises import Course, Run, exercised, exercises, forward, probe, sound_here
from lmconform.measuring.traces import Call, recorded
from lmconform.registry import COMPARES_LOGITS, register_check
from lmconform.specimen import Specimen

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.simulated import Origin, PlacementError, Stray

MOVED = "forward, moved after a first one"

UNREGISTERED = Hint(
    "a plain attribute that holds a tensor is seen neither by .to(device) nor by state_dict(): assign it with "
    "self.register_buffer(name, tensor, persistent=False)",
    "device.unregistered_tensor",
)
UNLISTED = Hint(
    "modules in a plain list or dict are met neither by .to(device) nor by parameters() and state_dict(): make it an "
    "nn.ModuleList or nn.ModuleDict",
    "device.unregistered_tensor",
)
ON_DEFAULT = Hint(
    "a tensor made without device= lies on the default device: write device=x.device, or make it from a tensor that is "
    "there (x.new_ones, torch.ones_like)",
    "device.created_on_default",
)
HARD_CODED = Hint(
    "a device is written into the code (.cuda(), device='cuda', a self.device remembered from __init__): take it from "
    "the input, x.device",
    "device.hard_coded",
)
KEPT = Hint(
    "made in the first call, on the device of that call, and kept in a closure, a cache or a plain attribute: register "
    "it as a buffer, or make it anew on x.device",
    "device.unregistered_tensor",
    "device.created_on_default",
)
REPLACED = Hint(
    "forward() assigns it anew, on the default device: make it in __init__, or with device=x.device",
    "device.created_on_default",
)
BRANCHES = Hint(
    "a line asks for the device (is_cuda, device.type, torch.cuda.is_available()) and computes something else there",
    "device.hard_coded",
)

_courses: WeakKeyDictionary[Specimen, tuple[int, Course, list[Course]]] = WeakKeyDictionary()


def courses(subject: Specimen, ctx: Context) -> tuple[Course, list[Course]]:
    """The exercises on the CPU, and on every other place there is; made once for all checks here.

    Pretended: cuda:1, where neither the CPU nor cuda:0 is right.
    """
    known = _courses.get(subject)
    if known is not None and known[0] == ctx.seed:
        return known[1], known[2]
    here = sound_here(subject, ctx)
    tasks = {name: task for name, task in exercises(subject).items() if here.runs[name].error is None}
    ids = probe(subject, ctx)
    there = []
    here.runs[MOVED] = here.runs["forward"]
    for device, context, pretended in _places():
        with context:
            copied = subject.unused()
            copied.module.to(device)
            course = exercised(copied, device, ids, tasks)
            ran = subject.copy()  # it has answered where it was: what it keeps from then must move, too
            ran.module.to(device)
            course.runs[MOVED] = exercised(ran, device, ids, {MOVED: forward}).runs[MOVED]
        course.pretended = pretended
        there.append(course)
    _courses[subject] = ctx.seed, here, there
    return here, there


def _places() -> Iterator[tuple[torch.device, AbstractContextManager[object], bool]]:
    """Each device to try, the context in which it is there, and whether it is pretended."""
    import torch

    from lmconform.simulated import SimulatedAccelerator, active_accelerator

    outer = active_accelerator()
    yield torch.device("cuda", 1), (outer or SimulatedAccelerator()).second_device(), True
    if outer is None:
        for device in real_devices():
            yield device, torch.backends.cudnn.flags(allow_tf32=False), False


def real_devices() -> list[torch.device]:
    """The accelerators of this machine."""
    import torch

    found = []
    if torch.cuda.is_available():
        found.append(torch.device("cuda", 0))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps", 0))
    return found


@register_check(
    "placement.moves",
    holds="after .to(device) every tensor used is there: on the simulated accelerator, and on cuda/mps where there is "
    "one",
    requires=COMPARES_LOGITS,
)
def check_moves(subject: Specimen, ctx: Context) -> None:
    """Forward, padded, with a cache, backward and generate() on the second of two simulated CUDA devices, and really.

    The simulation computes the CPU's values under CUDA's placement rules, and names the stray tensor. On the second
    device a tensor left on the CPU is out of place, and so is one that a bare .cuda() put on the first.
    """
    _, there = courses(subject, ctx)
    seen = False
    for course in there:
        for task, run in course.runs.items():
            if run.error is None:
                seen = True
                _came_back(ctx, course, task, run)
            elif course.pretended and run.beyond_pretence:
                ctx.note(f"{task} cannot be pretended, it wants the device's own kernels: {first_line(run.error)}")
            else:
                _raised(ctx, course, task, run)
        for name, place in course.strays.items():
            ctx.fail(
                f"the model is on {course.device}, but after a forward {name} is on {place}", where=name, hint=REPLACED
            )
    if not seen:
        ctx.not_applicable("; ".join(ctx.notes))


def _came_back(ctx: Context, course: Course, task: str, run: Run) -> None:
    wrong = [device for device in run.devices if device != course.device]
    if wrong:
        ctx.fail(
            f"the model is on {course.device}, and its logits come back on {wrong[0]} ({task})",
            hint=Hint(
                "the output is moved (.cpu(), .to('cpu')) or made on a fixed device: leave it where it was computed",
                "device.hard_coded",
            ),
        )


def _raised(ctx: Context, course: Course, task: str, run: Run) -> None:
    from lmconform.simulated import PlacementError

    assert run.error is not None
    if isinstance(run.error, PlacementError):
        message, where, hint = explained(run.error, run.place, course.device)
        ctx.fail(f"{message} ({task})", where=where, hint=KEPT if task == MOVED else hint)
    kind = "simulated " if course.pretended else ""
    ctx.fail(
        f"{task} runs on the CPU and raises on {kind}{course.device}: {type(run.error).__name__}: "
        f"{first_line(run.error)}",
        where=run.place,
        hint=Hint(
            ".numpy(), a torch.Generator or a table of functions by device wants the CPU: move the tensor first, or "
            "take the device from the input",
            "device.hard_coded",
        ),
    )


def explained(error: PlacementError, place: str, device: str) -> tuple[str, str, Hint]:
    """Message, where and hint for a tensor out of place while the model is on `device`."""
    stray, origin = error.stray, error.origin
    text = first_line(error).partition("The tensor on ")[0].strip()
    where = f"in {place}: {text}"
    if stray is not None and stray.kind in ("attribute", "global"):
        made = "" if origin is None else f"; it was made by {origin.place}"
        what = f"what is {stray}" if stray.derived else str(stray)
        return f"the model is on {device}, and {what} stays on {stray.place}{made}", where, _left(stray, origin)
    if stray is not None and stray.kind in ("parameter", "buffer"):
        hint = HARD_CODED if origin is not None and origin.device_given and "cpu" not in stray.place else REPLACED
        made = "" if origin is None else f"; it was made by {origin}"
        what = f"what is {stray}" if stray.derived else str(stray)
        return f"the model is on {device}, and {what} is on {stray.place}{made}", where, hint
    variable = "" if stray is None else str(stray).removeprefix("computed from ")
    known = variable and f": {variable}"
    if origin is not None and origin.device_given:
        return f"the model is on {device}, and a tensor is put elsewhere by {origin}{known}", where, HARD_CODED
    if origin is not None:
        return f"the model is on {device}, and a tensor is made by {origin}{known}", where, ON_DEFAULT
    return f"the model is on {device}, and {variable or 'a tensor'} is elsewhere", where, ON_DEFAULT


def _left(stray: Stray, origin: Origin | None) -> Hint:
    if stray.unlisted:
        return UNLISTED
    return HARD_CODED if origin is not None and origin.device_given and origin.call == "Tensor.cuda" else UNREGISTERED


@register_check(
    "placement.parity",
    holds="logits on the device equal the CPU's within tolerance",
    requires=(*COMPARES_LOGITS, "placement.moves"),
)
def check_parity(subject: Specimen, ctx: Context) -> None:
    """The same exercises by value. A simulated device computes what the CPU does unless the model asks which it is."""
    here, there = courses(subject, ctx)
    compared = False
    for course in there:
        for task, run in course.runs.items():
            expected = here.runs[task].values
            if run.values is None or expected is None:
                continue
            compared = True
            kind = "simulated " if course.pretended else ""
            try:
                ctx.equal(
                    run.values,
                    expected,
                    f"logits on {kind}{course.device} differ from the CPU's",
                    where=task,
                    hint=BRANCHES
                    if course.pretended
                    else "a kernel of the device computes something else: look at attention implementations, in-place "
                    "operations, and reduced precision (torch.backends)",
                )
            except Violation as violation:
                if first := _first_that_differs(subject, ctx, course, task, violation.allowed or 0.0):
                    violation.where = f"{first} is the first to differ; {violation.where}"
                raise
    if not compared:
        ctx.not_applicable("no forward could be run on a device")


def _first_that_differs(subject: Specimen, ctx: Context, course: Course, task: str, allowed: float) -> str:
    """The first module that is given what it is given on the CPU, and gives something else there."""
    exercise, ids = exercises(subject).get(task, forward), probe(subject, ctx)

    def followed_to(device: torch.device | str) -> list[Call]:
        copied = subject.copy()
        copied.module.to(device)
        made = recorded(copied, lambda: exercise(copied, ids.to(device)))
        inputs = [call.input.cpu() if call.input is not None else None for call in made]
        return [Call(call.name, given, call.output.cpu()) for call, given in zip(made, inputs, strict=True)]

    here = followed_to("cpu")
    there: list[Call] = []
    for device, context, _ in _places():
        if str(device) == course.device:
            with context:
                there = followed_to(device)

    def differ(ours: Tensor | None, theirs: Tensor | None) -> bool:
        if ours is None or theirs is None:
            return False
        return ours.shape != theirs.shape or float((ours.double() - theirs.double()).abs().max()) > allowed

    for ours, theirs in zip(here, there):
        if ours.name != theirs.name:
            return f"{theirs.name}, which runs instead of {ours.name},"
        if differ(ours.output, theirs.output) and not differ(ours.input, theirs.input):
            kind = type(subject.module.get_submodule(ours.name)).__name__
            return f"{ours.name} ({kind})" if ours.name else kind
    return ""


@register_check(
    "placement.default_device",
    holds="built and run under another default device",
    requires=(*COMPARES_LOGITS, "placement.moves"),
)
def check_default_device(subject: Specimen, ctx: Context) -> None:
    """torch.set_default_device("cuda"): the model as it is, on the CPU, and one that is built there.

    Whatever is made without device= then lands on the other side, also what is made once, in the constructor.
    """
    import torch

    from lmconform.simulated import SimulatedAccelerator, active_accelerator

    expected = sound_here(subject, ctx).runs["forward"].values
    assert expected is not None
    ids = probe(subject, ctx)
    outer = active_accelerator()
    accelerator = outer or SimulatedAccelerator(1)
    ways: list[tuple[torch.device, AbstractContextManager[object], bool]] = [
        (accelerator.devices[0], accelerator.active(), True)
    ]
    if outer is None:
        ways += [(device, nullcontext(), False) for device in real_devices()]
    for device, context, pretended in ways:
        with context:
            copied = subject.copy()
            copied.module.to("cpu")
            with default_device(device):
                course = exercised(copied, torch.device("cpu"), ids, {"forward": forward})
            _judged(ctx, course, pretended, expected, f"under the default device {device}")
            if subject.can("rebuild"):
                _built_there(subject, ctx, ids, device, pretended, expected)


@contextmanager
def default_device(device: torch.device) -> Iterator[None]:
    """torch.set_default_device, taken back at the end."""
    import torch

    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


def _built_there(
    subject: Specimen, ctx: Context, ids: Tensor, device: torch.device, pretended: bool, expected: Tensor
) -> None:
    assert subject.builder is not None
    text = f"built under the default device {device}"
    try:
        with default_device(device):
            module = subject.builder(subject.seed)
    except Exception as error:
        run = Run(error=error)
        if pretended and run.beyond_pretence:
            ctx.note(f"cannot be {text} here: {first_line(error)}")
            return
        ctx.fail(
            f"cannot be {text}: {first_line(error)}",
            where=raised_at(error.__cause__ or error),
            hint=Hint(
                "the constructor mixes tensors made with and without device=, or calls .numpy() on one",
                "device.created_on_default",
            ),
        )
    give_weights(module, subject.module)  # they were excited or loaded; what else the constructor computed stays
    built = subject._derive(cast(module, subject.dtype).eval())
    with default_device(device):
        course = exercised(built, built.device, ids, {"forward": forward})
    for name, place in course.strays.items():
        ctx.fail(
            f"{text}, the model is on {course.device}, but {name} is on {place}",
            where=name,
            hint=Hint("its device is written into the constructor", "device.hard_coded"),
        )
    _judged(ctx, course, pretended, expected, text)


def raised_at(error: BaseException) -> str:
    """'placement.py:12 in __init__': the innermost line that is neither torch's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/torch/" not in frame.filename and "/lmconform/" not in frame.filename]
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno} in {own[-1].name}" if own else ""


def _judged(ctx: Context, course: Course, pretended: bool, expected: Tensor, how: str) -> None:
    from lmconform.simulated import PlacementError

    run = course.runs["forward"]
    if run.error is not None:
        if pretended and run.beyond_pretence:
            ctx.note(f"{how}: it wants the device's own kernels")
            return
        if isinstance(run.error, PlacementError):
            message, where, hint = explained(run.error, run.place, course.device)
            ctx.fail(f"{how}, {message}", where=where, hint=hint)
        ctx.fail(
            f"{how} it raises {type(run.error).__name__}: {first_line(run.error)}", where=run.place, hint=ON_DEFAULT
        )
    assert run.values is not None
    ctx.equal(run.values, expected, f"logits differ {how}", hint=BRANCHES)
