"""positions: what shifting positions does, near and far out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.cases import Choice, Span
from lmconform.checks.block_kinds import states
from lmconform.checks.first_block import block_input
from lmconform.checks.positions import LONGEST, leave
from lmconform.context import Hint
from lmconform.copies import convert
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

FAR = 4000
DRIFT_FACTOR = 3.0  # two independent roundings differ by sqrt(2) of one; a collapsed position by tens
BY_LENGTH = {"dynamic", "longrope"}  # rotary rescalings that change with the length, beyond the original context
BY_POSITION = (
    "attn_temperature_tuning", "log_scaling_n_floor", "llama_4_scaling_beta", "compress_rates", "index_topk_blocks",
    "absolute_position_scores",
)  # fmt: skip


@register_check(
    "positions.shift",
    holds="where relative: adding a constant to position_ids leaves logits alone",
    needs=("pos",),
    requires=COMPARES_LOGITS,
    space={"by": Choice("one", "some", "end"), "time": Span(2, 40)},
    grid=({"by": "one", "time": 24}, {"by": "some", "time": 24}, {"by": "end", "time": 24}),
)
def check_shift(subject: Specimen, ctx: Context) -> None:
    """Positions are relative where the first block receives the same whatever they are, and yet they matter.

    By 1, by some, and up to the end of the context.
    """
    import torch

    for case in ctx.cases():
        time = subject.longest(case.time)
        room = _room(subject, ctx, LONGEST) - time
        if room < 1:
            leave(ctx, "the context leaves no room to shift in")
        by = {"one": 1, "some": min(52, room), "end": room}[case.by]
        ids = ctx.ids(1, time)
        positions = torch.arange(time, device=ids.device)[None]
        _relative(subject, ctx, ids, positions, by)
        shifted, expected = subject.logits(ids, positions=positions + by), subject.logits(ids, positions=positions)
        ctx.equal(
            shifted,
            expected,
            f"logits change when every position moves by {by}, though nothing but attention sees the positions",
            hint=Hint(
                "attention depends on absolute positions: queries or keys alone are rotated, or by different angles, "
                "two rotations are in force at once, or positions are clamped or wrapped inside the context",
                "position.one_side_rotated",
                "position.not_relative",
                "position.collision",
                "position.base_kept",
            ),
        )


def _relative(subject: Specimen, ctx: Context, ids: Tensor, positions: Tensor, by: int) -> None:
    """Leaves the check where positions are absolute, by their place in the model or by what the config states."""
    import torch

    config = subject.config
    parameters = getattr(config, "rope_parameters", None) or {}
    for name in BY_POSITION:
        if states(config, name) or (isinstance(parameters, dict) and name in parameters):
            ctx.not_applicable(f"the config states that attention depends on the absolute position ({name})")
    near = block_input(subject, ids, positions=positions)
    far = block_input(subject, ids, positions=positions + by)
    if near is None or far is None:
        leave(ctx, "what the first block receives cannot be told, so neither whether positions are relative")
    if not torch.equal(near, far):
        ctx.not_applicable("positions are absolute: they are added to what the first block receives")
    spaced = subject.logits(ids, positions=positions * 2 + (torch.arange(ids.shape[1]) % 2).to(positions))
    change = float((spaced - subject.logits(ids, positions=positions)).abs().max())
    if change <= tolerance.allowed(subject.noise, spaced):
        ctx.not_applicable(f"{subject.convention.positions} has no effect on the logits")


def _room(subject: Specimen, ctx: Context, wanted: int) -> int:
    """Positions within which one set of frequencies holds: dynamic kinds of rescaling change them with the length."""
    kinds, original = frequency_kinds(subject.config)
    if kinds & BY_LENGTH:
        if original is None:
            leave(ctx, f"rotary frequencies change with the length ({', '.join(sorted(kinds))})")
        wanted = min(wanted, original)
    return subject.longest(wanted)


def frequency_kinds(config: Any) -> tuple[set[str], int | None]:
    """Names of the rotary rescalings that the config states, and the context they start from."""
    found: set[str] = set()
    original: int | None = getattr(config, "original_max_position_embeddings", None)
    pending = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    while pending:
        part = pending.pop()
        if not isinstance(part, dict):
            continue
        pending.extend(part.values())
        kind = part.get("rope_type", part.get("type"))
        if isinstance(kind, str):
            found.add(kind)
        original = original or part.get("original_max_position_embeddings")
    if "dynamic" in found and original is None:
        original = getattr(config, "max_position_embeddings", None)
    return found, original


@register_check(
    "positions.precision",
    holds=f"the encoding keeps its precision in half types far out (position {FAR} against float64)",
    needs=("pos",),
    profile="smoke",
    requires=COMPARES_LOGITS,
    space={"dtype": Choice("bfloat16", "float16")},
    grid=({"dtype": "bfloat16"}, {"dtype": "float16"}),
)
def check_precision(subject: Specimen, ctx: Context) -> None:
    """Half-precision logits far out against those near position 0, in units of what half precision costs near 0.

    Relative positions: both are the same in exact arithmetic. Absolute ones: each is held against its own float32 or
    float64 value, in what the first block receives. Positions or angles made in bfloat16 collapse from 256 on, in
    float16 from 2048 on (transformers issue 25681 among others).
    """
    import torch

    time = subject.longest(24)
    ids = ctx.ids(4, time)
    near = torch.arange(time, device=ids.device).expand(4, time)
    kinds, _ = frequency_kinds(subject.config)
    if kinds & BY_LENGTH:
        ctx.not_applicable(f"rotary frequencies change with the length ({', '.join(sorted(kinds))})")
    exact = subject.twin() or subject
    absolute = _absolute(exact, ids, near)
    if absolute:
        far = _far_absolute(exact, ctx, ids, near)
    else:
        far = near + FAR
        try:
            _relative(exact, ctx, ids, near, FAR)
            exact.logits(ids, positions=far)
        except (IndexError, RuntimeError, ValueError) as error:
            leave(ctx, f"takes no position {FAR} ({type(error).__name__})")
    ran = False
    for case in ctx.cases():
        dtype = getattr(torch, case.dtype)
        half = _in_half(subject, dtype)
        ask = block_input if absolute else _logits
        try:
            measured_near, measured_far = ask(half, ids, positions=near), ask(half, ids, positions=far)
        except Exception as error:
            ctx.note(f"does not run in {case.dtype} ({type(error).__name__})")
            continue
        finally:
            del half  # before the next one is made
        right_near, right_far = ask(exact, ids, positions=near), ask(exact, ids, positions=far)
        if measured_near is None or measured_far is None or right_near is None or right_far is None:
            continue
        if not bool(measured_near.isfinite().all()):
            ctx.note(f"gives no finite numbers in {case.dtype}, near position 0 either")
            continue
        ran = True
        cost = max(_drift(measured_near, right_near), tolerance.epsilon(dtype) * float(right_near.std()) / 8)
        ctx.within(
            _drift(measured_far, right_far),
            DRIFT_FACTOR * cost,
            f"in {case.dtype} at positions from {int(far[0, 0])} on, {'encodings' if absolute else 'logits'} drift "
            f"from {_name(exact)} far more than near position 0",
            hint=Hint(
                "positions, frequencies or angles are made in half precision: make them in float32 and cast cos and "
                "sin (or the finished encoding) at the end",
                "position.low_precision",
            ),
        )
    if not ran:
        ctx.not_applicable("; ".join(ctx.notes) or "nothing to compare")


def _in_half(subject: Specimen, dtype: torch.dtype) -> Specimen:
    """A copy in that type. Buffers that are not saved stay in float32, as transformers' loader leaves them."""
    import torch

    half = subject.copy()
    kept: list[tuple[nn.Module, str, Tensor]] = []
    if subject.model_type is not None:
        kept = [
            (part, name, buffer)
            for part in half.module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None and name in part._non_persistent_buffers_set
        ]
    convert(half.module, dtype)
    for part, name, buffer in kept:
        part._buffers[name] = buffer.to(torch.float32) if buffer.is_floating_point() else buffer
    return half


def _logits(subject: Specimen, ids: Tensor, **inputs: Any) -> Tensor:
    return subject.logits(ids, **inputs)


def _absolute(subject: Specimen, ids: Tensor, positions: Tensor) -> bool:
    """Whether what the first block receives depends on the positions."""
    import torch

    near = block_input(subject, ids, positions=positions)
    turned = block_input(subject, ids, positions=positions.flip(-1))
    return near is not None and turned is not None and not torch.equal(near, turned)


def _far_absolute(subject: Specimen, ctx: Context, ids: Tensor, near: Tensor) -> Tensor:
    """The farthest positions that an absolute encoding takes, up to FAR."""
    for start in (FAR, (subject.context_length or FAR) - ids.shape[1]):
        if start < 512:
            break
        try:
            block_input(subject, ids, positions=near + start)
        except (IndexError, RuntimeError, ValueError):  # the table ends before: try the stated context
            continue
        return near + start
    leave(ctx, "the position table ends before half precision could lose positions")


def _drift(actual: Tensor, exact: Tensor) -> float:
    """The typical error of a token: the median over tokens, so that one flipped expert does not decide."""
    return float((actual.double() - exact.double()).square().mean(-1).sqrt().median())


def _name(subject: Specimen) -> str:
    return str(subject.dtype).removeprefix("torch.")
