"""placement.compile: the model's code as a compiler takes it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring.exercises import TIME, padded
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

SLOW_TRACE = 8.0  # seconds of tracing a forward beyond which generating code would take minutes

BAKED = Hint(
    "the trace took another path or keeps a value from when it was made: torch.compiler.is_compiling(), .item() or a "
    "Python number that later calls change",
    "device.hard_coded",
)


@register_check(
    "placement.compile",
    holds="torch.compile and torch.export give equal logits (graph breaks listed)",
    requires=COMPARES_LOGITS,
    profile="thorough",
)
def check_compile(subject: Specimen, ctx: Context) -> None:
    """Traced at two lengths, the second padded (aot_eager), exported, and compiled to code (inductor), where it lies.

    Graph breaks cost speed only, and are listed. torch.export may refuse a model aloud; what it takes must be right.
    """
    from lmconform.simulated import active_accelerator

    if active_accelerator() is not None:
        ctx.not_applicable("nothing can be compiled for a simulated device: check it on cpu or cuda")
    if missing := no_compiler(subject.device):
        ctx.not_applicable(missing)
    inputs = {"a forward": ctx.ids(2, subject.longest(TIME)), "another length": ctx.ids(2, subject.longest(TIME + 5))}
    started = time.perf_counter()
    _compiled(subject, ctx, inputs, "aot_eager")
    tracing = time.perf_counter() - started
    _exported(subject, ctx, inputs["a forward"])
    if tracing > SLOW_TRACE * len(inputs):
        ctx.note(f"no code was generated: tracing alone took {tracing:.0f} s")
        return
    _compiled(subject, ctx, {"a forward": inputs["a forward"]}, "inductor")


def no_compiler(device: torch.device) -> str:
    """Why torch.compile cannot generate code for that device; empty where it can."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "no Triton is installed, which torch.compile needs for CUDA"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler is installed, which torch.compile needs for the CPU (g++, or name one in CXX)"
    return ""


def _compiled(subject: Specimen, ctx: Context, inputs: dict[str, Tensor], backend: str) -> None:
    import torch
    from torch._dynamo.utils import counters
    from torch._inductor import config

    torch._dynamo.reset()
    counters.clear()
    copied = subject.copy()
    copied.module.compile(backend=backend)
    hint = (
        "the fault is the compiler's, or the model relies on Python that cannot be traced: see TORCH_LOGS=graph_breaks"
    )
    try:
        with config.patch(compile_threads=1):
            for what, ids in inputs.items():
                pad = what != "a forward" and bool(subject.can("mask"))
                _agree(copied, subject, ctx, ids, pad, f"{what}, {'padded, ' * pad}compiled by {backend}")
    except torch._dynamo.exc.TorchDynamoException as error:
        ctx.fail(f"torch.compile with {backend} raises {type(error).__name__}: {first_line(error)}", hint=hint)
    finally:
        breaks = dict(counters["graph_break"])
        torch._dynamo.reset()
    if breaks:
        listed = "; ".join(reason.partition("\n")[0] for reason in list(breaks)[:3])
        count = "1 graph break" if len(breaks) == 1 else f"{len(breaks)} graph breaks"
        ctx.note(f"{count}: {listed}{'; ...' if len(breaks) > 3 else ''}")


def _agree(copied: Specimen, subject: Specimen, ctx: Context, ids: Tensor, pad: bool, where: str) -> None:
    run = padded if pad else lambda model, tokens: model.logits(tokens)
    ctx.equal(run(copied, ids), run(subject, ids), "logits of the compiled model differ", where=where, hint=BAKED)


def _exported(subject: Specimen, ctx: Context, ids: Tensor) -> None:
    import torch
    from torch import nn

    class LogitsOnly(nn.Module):
        """Caches and output classes are no business of an exported program."""

        def __init__(self, copied: Specimen) -> None:
            super().__init__()
            self.inner = copied.module
            self.run = copied.convention.run

        def forward(self, ids: Tensor) -> Any:
            return self.run(self.inner, ids, use_cache=False).logits

    copied = subject.copy()
    copied.module.eval()
    try:
        with torch.no_grad():
            program = torch.export.export(LogitsOnly(copied), (ids,), strict=False)
    except Exception as error:
        ctx.note(f"torch.export refuses it: {type(error).__name__}: {first_line(error)}")
        return
    again = ctx.ids(ids.shape[0], ids.shape[1], salt=1)
    with torch.no_grad():
        logits = program.module()(again)
    ctx.equal(logits, subject.logits(again), "logits of the exported program differ", where="torch.export", hint=BAKED)
