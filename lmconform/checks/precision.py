"""precision: a model converted to a half type computes in it, stays finite, and drifts no more than rounding does."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmconform import structure
from lmconform.checks.unregistered_tensors import loose_tensors
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring import drift
from lmconform.measuring.rounding import Choices, Trace, in_type, kept_in_float32, traced
from lmconform.measuring.roundings import rounding_in
from lmconform.measuring.traces import hooked
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

LARGER = 3.0  # times the excited matrices: scores nine times as large, as in trained models whose attention is sharp
ROOM = 8.0  # what a module computes inside may be larger than what it gives, by so much
NORM_PEAK = 600.0  # an activation that float16 holds and whose square it does not
OVERFLOWS = ("without overflow", "cannot be converted to type")

HARD_CODED = Hint(
    "a type is written into the code (.float(), dtype=torch.float32, torch.float32 tables), or an operation takes no "
    "half types (torch.fft): compute it in float32 and cast the result back to the input's type, .to(x.dtype)",
    "dtype.hard_coded",
)
MASK_CONSTANT = Hint(
    "a constant for masked scores is too large for the type: float16 ends at 65504; use torch.finfo(scores.dtype).min",
    "mask.half_overflow",
)
OVERFLOW = Hint(
    "an intermediate value leaves the type's range (squares and sums do so first): compute it in float32 and cast back",
    "dtype.overflow",
)
LOSES = Hint(
    "something is computed in the half type that does not bear it: positions, angles, norms, a softmax or long sums; "
    "compute it in float32 and cast back",
    "dtype.low_precision",
    "position.low_precision",
)


@register_check(
    "precision.bfloat16",
    holds="runs wholly in bfloat16, finite, drift from float64 within the type's bound; autocast too",
    requires=COMPARES_LOGITS,
)
def check_bfloat16(subject: Specimen, ctx: Context) -> None:
    """See `check_type`. bfloat16 has float32's range and 8 bits: whole numbers are exact up to 256."""
    import torch

    check_type(subject, ctx, torch.bfloat16)


@register_check(
    "precision.float16",
    holds="runs wholly in float16, finite, drift from float64 within the type's bound; autocast too",
    requires=COMPARES_LOGITS,
)
def check_float16(subject: Specimen, ctx: Context) -> None:
    """See `check_type`. float16 has 11 bits and ends at 65504: norms also get activations whose squares do not fit.

    Trained models have such activations (Dettmers et al. 2022; Sun et al. 2024, massive activations), fresh ones not.
    """
    import torch

    check_type(subject, ctx, torch.float16)
    check_norms(subject, ctx, torch.float16)
    check_large_scores(subject, ctx, torch.float16)


def check_type(subject: Specimen, ctx: Context, dtype: torch.dtype) -> None:
    """The model in `dtype` against a float64 model of the same, rounded weights: see `lmconform.measuring.drift`."""
    import torch

    half = in_type(subject, dtype)
    runs = drift.runs(subject, ctx.ids(2, subject.longest(drift.TIME)))
    exact, references = drift.references(half, runs)
    if exact.dtype != torch.float64:
        ctx.note("held against float32, since it does not run in float64")
    noise: tuple[float, float] | None = None
    for what, run in runs.items():
        choices, expected = references[what]
        trace = Trace()
        try:
            with choices.mode(replay=True), traced(half.module) as trace:
                logits = run(half)
        except Exception as error:
            _raised(half, ctx, dtype, error, trace, what)
        _finite(ctx, dtype, logits, trace, what)
        _in_type(half, ctx, dtype, trace, what)
        if noise is None:
            noise = drift.noise(exact, dtype, trace.outside(dtype), run, references[what])
        _drifts(ctx, dtype, logits, expected, noise, f"logits{what}", "")
    assert noise is not None
    _autocast(half, ctx, dtype, runs[""], references[""], noise)


def _drifts(
    ctx: Context, dtype: torch.dtype, logits: Tensor, expected: Tensor, noise: tuple[float, float], what: str, how: str
) -> None:
    found = list(drift.drifts(logits, expected, noise))
    if any(size > bound for size, bound, _ in found) and (place := _rounds(ctx)):
        ctx.note(
            f"forward() rounds what it computes ({place}): numbers near a step fall on either side of it, so the drift "
            f"in {_name(dtype)} is not judged"
        )
        return
    for size, bound, where in found:
        ctx.within(
            size,
            bound,
            f"{what} in {_name(dtype)}{how} drift from float64 by more than rounding explains",
            where=where,
            hint=LOSES,
        )


def _rounds(ctx: Context) -> str:
    return rounding_in(ctx.subject, ctx.ids(1, ctx.subject.longest(8)))


def _raised(half: Specimen, ctx: Context, dtype: torch.dtype, error: Exception, trace: Trace, what: str) -> None:
    text = first_line(error)
    if "not implemented for" in text:
        ctx.not_applicable(f"{half.device.type} has no kernel for {_name(dtype)}: {text}")
    place = f"in {trace.place}{_line(error)}" if trace.place else _line(error).strip()
    message = f"does not run in {_name(dtype)}{what and f' on inputs{what}'}: {type(error).__name__}: {text}"
    if any(part in text for part in OVERFLOWS):
        ctx.fail(message, where=place, hint=MASK_CONSTANT)
    _blame(half, ctx, dtype, trace, message, place)


def _blame(half: Specimen, ctx: Context, dtype: torch.dtype, trace: Trace, message: str, place: str) -> None:
    """Fail, naming what brings another type in: an unregistered table, a replaced buffer, or the first module."""
    module = half.module
    wide = kept_in_float32(module, dtype)
    held = [(name, tensor, "neither parameter nor buffer, so .to(dtype) passes it by")
            for name, kind, tensor in loose_tensors(module) if tensor.dtype != dtype]  # fmt: skip
    registered: list[tuple[str, Any]] = [*module.named_parameters(), *module.named_buffers()]
    held += [(name, tensor, "replaced after the conversion") for name, tensor in registered
             if tensor.is_floating_point() and tensor.dtype != dtype
             and (wide is None or not wide.search(name))]  # fmt: skip
    inside = trace.place.partition(" ")[0]
    held.sort(key=lambda item: not (inside and item[0].startswith(inside)))
    if held:
        name, tensor, why = held[0]
        more = f" ({len(held) - 1} more)" if held[1:] else ""
        ctx.fail(
            message,
            where=f"{place}; {name} is {_name(tensor.dtype)}{more}",
            hint=Hint(f"{name} is {why}: register it as a buffer, or cast it where it is used", "dtype.hard_coded"),
        )
    step = trace.first_outside(dtype)
    if step is not None:
        place += f"; {step.name or step.kind} ({step.kind}) is the first to give {_names(step.dtypes)}"
    ctx.fail(message, where=place, hint=HARD_CODED)


def _finite(ctx: Context, dtype: torch.dtype, logits: Tensor, trace: Trace, what: str, how: str = "") -> None:
    if bool(logits.isfinite().all()):
        return
    kind = "NaN" if bool(logits.isnan().any()) else "infinite"
    step = trace.first_infinite()
    place = f"{step.name} ({step.kind}) is the first to give such numbers" if step is not None else ""
    ctx.fail(
        f"logits{what} are {kind} in {_name(dtype)}{how}, and finite in float64",
        where=place,
        hint=Hint(f"{MASK_CONSTANT}; rows that see nothing become NaN", "mask.half_overflow", "mask.padding_nan")
        if what
        else OVERFLOW,
    )


def _in_type(half: Specimen, ctx: Context, dtype: torch.dtype, trace: Trace, what: str) -> None:
    """The residual stream stays in the type. Routers and logits may be float32 on purpose, and are noted."""
    found = structure.blocks(half.module)
    names = {f"{found[0]}.{index}" for index in range(len(found[1]))} if found is not None else set()
    outside = [step for step in trace.steps if any(made != dtype for made in step.dtypes)]
    stream = [step for step in outside if step.name in names and step.dtypes[0] != dtype]
    if stream and getattr(half.config, "residual_in_fp32", False):
        ctx.note("the residual stream is float32: residual_in_fp32")
    elif stream:
        step = stream[0]
        message = f"the residual stream leaves {_name(dtype)}: {step.name} ({step.kind}) gives {_names(step.dtypes)}"
        _blame(half, ctx, dtype, trace, message, f"{step.name}{what and f', on inputs{what}'}")
    elif outside and outside[-1].name == "" and outside[-1].dtypes[:1] != (dtype,):
        ctx.note(f"the logits come as {_names(outside[-1].dtypes[:1])}")


def _autocast(
    half: Specimen,
    ctx: Context,
    dtype: torch.dtype,
    run: Callable[[Specimen], Tensor],
    reference: tuple[Choices, Tensor],
    noise: tuple[float, float],
) -> None:
    """float32 weights (of the same rounded values) under autocast: mixed types meet inside."""
    import torch

    single = in_type(half, torch.float32)
    choices, expected = reference
    trace = Trace()
    try:
        with (
            torch.autocast(half.device.type, dtype=dtype),
            choices.mode(replay=True),
            traced(single.module) as trace,
        ):
            logits = run(single)
    except Exception as error:
        text = first_line(error)
        if "not implemented for" in text:
            ctx.note(f"autocast: {half.device.type} has no kernel: {text}")
            return
        place = f"in {trace.place}{_line(error)}" if trace.place else _line(error).strip()
        ctx.fail(
            f"does not run under autocast({_name(dtype)}): {type(error).__name__}: {text}", where=place, hint=HARD_CODED
        )
    if not bool(logits.isfinite().all()):
        _finite(ctx, dtype, logits, trace, " under autocast")
    _drifts(ctx, dtype, logits, expected, noise, "logits", " autocast")


# -- scores that overflow ----------------------------------------------------------------------------------------------


def check_large_scores(subject: Specimen, ctx: Context, dtype: torch.dtype) -> None:
    """Finite with matrices LARGER times as large, where what modules give fits the type: exp() of a score may not."""
    import torch

    ids = ctx.ids(2, subject.longest(drift.TIME))
    half = in_type(subject.scaled(LARGER), dtype)
    exact = in_type(half, torch.float64)
    peaks: list[float] = []

    def note(part: nn.Module, args: Any, output: Any) -> None:
        made = output[0] if isinstance(output, tuple) and output else output
        if isinstance(made, torch.Tensor) and made.is_floating_point():
            peaks.append(float(made.abs().max()))

    try:
        with hooked(*(part.register_forward_hook(note) for part in exact.module.modules())):
            exact.logits(ids)
        if not peaks or not max(peaks) < torch.finfo(dtype).max / ROOM:
            return
        with traced(half.module) as trace:
            logits = half.logits(ids)
    except Exception as error:
        ctx.note(f"was not tried with larger matrices: {type(error).__name__}: {first_line(error)}")
        return
    _finite(ctx, dtype, logits, trace, "", f", matrices {LARGER:g} times as large")


# -- norms that overflow -----------------------------------------------------------------------------------------------


def check_norms(subject: Specimen, ctx: Context, dtype: torch.dtype) -> None:
    """Each norm alone, on its own inputs scaled to a peak of NORM_PEAK, in the type against float64."""
    import torch

    half = in_type(subject, dtype)
    exact = in_type(half, torch.float64)
    given = _inputs_of_norms(half, ctx)
    for name, (args, kwargs) in given.items():
        peak = float(args[0].double().abs().max())
        if not 0 < peak < NORM_PEAK:
            continue
        large = (args[0].double() * (NORM_PEAK / peak)).to(dtype)
        wide = [_cast(value, torch.float64) for value in (large, *args[1:])]
        try:
            with torch.no_grad():
                expected = exact.module.get_submodule(name)(
                    *wide, **{key: _cast(value, torch.float64) for key, value in kwargs.items()}
                )
                actual = half.module.get_submodule(name)(large, *args[1:], **kwargs)
        except Exception as error:
            ctx.note(f"{name} was not tried on large activations: {type(error).__name__}: {first_line(error)}")
            continue
        if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape:
            continue
        kind = type(half.module.get_submodule(name)).__name__
        scale = float(expected.abs().max())
        ctx.equal(
            actual,
            expected,
            f"{name} ({kind}) in {_name(dtype)} fails on activations up to {NORM_PEAK:g}, which the type holds",
            where=name,
            hint=Hint(
                "the norm squares and sums in the half type: x.float() first, and back at the end", "dtype.overflow"
            ),
            allowed=16 * torch.finfo(dtype).eps * max(scale, 1e-3),
            axes=(),
        )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    import torch

    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _inputs_of_norms(half: Specimen, ctx: Context) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the leaf modules called norms are called with, the first of each kind at each depth of the stack."""
    import torch

    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
                seen.setdefault(name, (tuple(_detached(value) for value in args), dict(kwargs)))

        return hook

    norms = [
        (name, part)
        for name, part in half.module.named_modules()
        if "norm" in type(part).__name__.lower() and not list(part.children())
    ]
    with hooked(*(part.register_forward_pre_hook(watch(name), with_kwargs=True) for name, part in norms)):
        half.logits(ctx.ids(1, half.longest(6)))
    return seen


def _detached(value: Any) -> Any:
    import torch

    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _line(error: Exception) -> str:
    """' at modeling.py:12': the subject's line that raised."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and "/lmconform/" not in frame.filename
    ]
    return f" at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " and ".join(dict.fromkeys(_name(dtype) for dtype in dtypes))
