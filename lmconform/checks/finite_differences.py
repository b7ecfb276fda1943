"""gradients.correct: what backward() says, against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from lmconform import structure, tolerance
from lmconform.checks.gradients import projected_gradients, projection
from lmconform.context import Hint
from lmconform.conventions import first_line
from lmconform.measuring.adapters import wraps_adapters
from lmconform.measuring.dropout import without_dropout
from lmconform.measuring.roundings import rounding_in
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

STEPS = (1e-4, 1e-3, 1e-5, 1e-2, 1e-6)  # relative to each parameter's own RMS
SHARP = 1e-6  # a finite difference this sure of itself needs no smaller step
DORA = "DoRA takes the norm of the weights for a constant in backward() (Liu et al. 2024, arXiv:2402.09353, 4.3)"
BLUNT = 0.05  # one less sure than this decides nothing


@register_check(
    "gradients.correct",
    holds="directional derivative equals finite differences in float64, per parameter group",
    requires=COMPARES_LOGITS,
)
def check_correct(subject: Specimen, ctx: Context) -> None:
    """Central differences with Richardson's extrapolation, per block, in a float64 copy.

    Parts that cast to float32 inside (norms, rotary angles) are kept in float64 by a function mode where that works;
    what rounding is left is measured, and the bound is that noise over the step plus the extrapolation's own
    correction. Of several steps the surest counts. A model that rounds its weights or activations, and says itself what
    gradient goes through (straight-through, Bengio et al. 2013, arXiv:1308.3432), has steps for finite differences.

    Source: gradient checking by finite differences, as torch.autograd.gradcheck does for single operations.
    """
    import torch

    if wraps_adapters(subject.module) and any(
        "lora_magnitude_vector" in n for n, _ in subject.module.named_parameters()
    ):
        ctx.not_applicable(DORA)
    ids = ctx.ids(1, subject.longest(20))
    exact = subject if subject.dtype == torch.float64 else subject.whole_twin() or cast_to_float64(subject)
    wide = without_dropout(exact)
    weights = projection(wide, ctx, ids)
    with everything_in_float64(wide, ids):
        try:
            refused = "" if wide.logits(ids).dtype == torch.float64 else "it answers in another type"
        except Exception as error:
            refused = f"{type(error).__name__}: {first_line(error)}"
        if refused:
            ctx.not_applicable(f"finite differences need float64, and the model does not run in it ({refused})")
        if place := rounding_in(wide, ids):
            ctx.not_applicable(
                f"forward() rounds what it computes ({place}): finite differences have no derivative there"
            )
        left = projected_gradients(wide, ctx, ids, train=False)
        grads = {name: grad for name, grad in left.items() if grad is not None}
        parameters = {name: p for name, p in wide.module.named_parameters() if name in grads}
        directions = {name: direction(p, ctx, index) for index, (name, p) in enumerate(parameters.items())}
        for name, row in padding_rows(wide.module).items():
            if name in directions:
                directions[name][row] = 0
        originals = {name: p.detach().clone() for name, p in parameters.items()}

        def value(names: list[str], step: float) -> float:
            with torch.no_grad():
                for name in names:
                    parameters[name].copy_(originals[name] + step * directions[name])
                total = (wide.logits(ids).double() * weights).sum()
                for name in names:
                    parameters[name].copy_(originals[name])
            return float(total)

        names = list(parameters)
        base = value(names, 0.0)
        noise = max(
            tolerance.epsilon(torch.float64) * float((wide.logits(ids).double() * weights).abs().sum()),
            *(abs(value(names, t) - 2 * base + value(names, -t)) for t in (1e-9, 2e-9, 3e-9)),
        )
        undecided: list[str] = []
        found: list[tuple[float, float, str, str]] = []
        groups = parameter_groups(wide.module, names)
        for group, members in groups.items():
            products = [float((grads[name].conj() * directions[name]).real.sum()) for name in members]  # also complex
            stated = sum(products)
            scale = max(sum(product * product for product in products) ** 0.5, noise)
            measured, bound = surest_difference(partial(value, members), noise, scale)
            if not bound <= BLUNT * scale and not abs(measured - stated) > 100 * bound:
                undecided.append(group)
                continue
            scale = max(scale, abs(measured))
            figures = f"backward() says {stated:.6g}, finite differences {measured:.6g}"
            found.append((abs(measured - stated) / scale, bound / scale, group, figures))
    judge_groups(ctx, found)
    if len(undecided) == len(groups):
        ctx.not_applicable("finite differences decide nothing: the model is not smooth enough, even in float64")
    if undecided:
        ctx.note(f"not smooth enough to decide: {', '.join(undecided)}")


@contextmanager
def everything_in_float64(subject: Specimen, ids: Tensor) -> Iterator[None]:
    """Casts to float32 inside the model give float64, if the model runs that way; otherwise without effect."""
    import torch
    from torch.overrides import TorchFunctionMode

    narrow = (torch.float32, torch.bfloat16, torch.float16)

    class Widen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.float:
                return args[0].double()
            args = tuple(torch.float64 if _is(arg, narrow) else arg for arg in args)
            kwargs = {key: torch.float64 if _is(arg, narrow) else arg for key, arg in (kwargs or {}).items()}
            return func(*args, **kwargs)

    default = torch.get_default_dtype()
    mode: Any = Widen()
    torch.set_default_dtype(torch.float64)
    try:
        with mode:
            subject.logits(ids)
    except Exception:  # then rounding to float32 inside is measured as noise instead
        torch.set_default_dtype(default)
        mode = nullcontext()
    try:
        with mode:
            yield
    finally:
        torch.set_default_dtype(default)


def _is(value: Any, dtypes: tuple[Any, ...]) -> bool:
    return any(value is dtype for dtype in dtypes)


def cast_to_float64(subject: Specimen) -> Specimen:
    """A copy in float64 of a model that, left to itself, falls back to another type inside."""
    import torch

    copied = subject.copy()
    copied.module.to(torch.float64)
    set_experts = getattr(copied.module, "set_experts_implementation", None)
    if callable(set_experts):  # the grouped kernels take no float64
        set_experts("eager")
    return copied


def direction(parameter: Tensor, ctx: Context, index: int) -> Tensor:
    """A random direction of the parameter's own size."""
    import torch

    drawn = torch.randn(parameter.shape, generator=ctx.generator(23, index), dtype=torch.float64)
    size = float(parameter.detach().double().square().mean().sqrt()) or 0.1
    return (drawn * size).to(parameter)


def padding_rows(module: nn.Module) -> dict[str, int]:
    """Of each table with a padding row, that row: nn.Embedding gives it no gradient, which is what it is for."""
    from torch import nn

    return {
        f"{name}.weight" if name else "weight": part.padding_idx
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding) and part.padding_idx is not None
    }


def surest_difference(value: Callable[[float], float], noise: float, scale: float) -> tuple[float, float]:
    """Derivative at 0 of `value(step)` by extrapolated central differences, and its own bound; the surest step's."""
    best = (float("nan"), float("inf"))
    for step in STEPS:
        coarse = (value(step) - value(-step)) / (2 * step)
        fine = (value(step / 2) - value(-step / 2)) / step
        bound = tolerance.FACTOR * noise / step + abs(fine - coarse)
        if bound < best[1]:
            best = ((4 * fine - coarse) / 3, bound)
        if best[1] <= SHARP * scale:
            break
    return best


def judge_groups(ctx: Context, found: list[tuple[float, float, str, str]]) -> None:
    """Violation that names the last wrong group in the order of the forward pass: all before it inherit its fault."""
    wrong = [item for item in found if not item[0] <= item[1]]
    blocks = [item for item in wrong if item[2].startswith("block ")]
    shown = (blocks or wrong)[-1:] or found
    right = [item[2] for item in found if item[0] <= item[1]]
    others = [item[2] for item in wrong if item not in shown]
    context = "".join(
        f"; {word}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for word, names in (("wrong too", others), ("right", right))
        if names
    )
    for measured, allowed, group, figures in shown:
        ctx.within(
            measured, allowed, f"gradient of {group} disagrees with finite differences of the logits (relative)",
            where=f"{group}: {figures}{context}",
            hint=Hint("at or just after the last wrong part, a piece of the forward pass is hidden from autograd or "
            "replaced in it: detach(), .data, no_grad(), a straight-through rounding, a hand-written backward(), a "
            "hook that scales gradients", "grad.wrong", "grad.dead_parameter"),
        )  # fmt: skip


def parameter_groups(module: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """Parameters by block, and the rest by module."""
    found = structure.blocks(module)
    prefix = found[0] + "." if found else None
    groups: dict[str, list[str]] = {}
    for name in names:
        if prefix and name.startswith(prefix):
            index = name.removeprefix(prefix).partition(".")[0]
            groups.setdefault(f"block {index}", []).append(name)
        else:
            groups.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return groups
