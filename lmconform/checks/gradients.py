"""gradients: what backward() leaves on the parameters is there, is right, and has a sane size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lmconform import structure, tolerance
from lmconform.cases import Choice
from lmconform.excitation import excite
from lmconform.registry import register_check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

REQUIRES = ("contract.shape", "contract.finite", "contract.repeatable")
STEPS = (1e-3, 1e-4, 1e-5, 1e-6)  # relative to each parameter's own RMS
SHARP = 1e-6  # a finite difference this sure of itself needs no smaller step
BLUNT = 0.05  # one less sure than this decides nothing
RETRIES = 3  # other random weights under which a parameter may be reached after all


@register_check(
    "gradients.reach",
    holds="every trainable parameter gets a finite gradient above noise, or is shown to be invariant or unused for a "
    "declared reason; what is frozen stays",
    requires=REQUIRES,
    profile="smoke",
)
def check_reach(subject: Specimen, ctx: Context) -> None:
    """A random projection of all logits goes backward, in train mode with dropout off.

    A parameter without a gradient is tried again under other random weights and more tokens (experts that were not
    routed to, dead ReLUs), then moved: a bias that moves no logit (a key bias under softmax) is invariant and
    excused, a matrix that moves none is dead, and whatever moves logits without having a gradient is cut off.
    """
    quiet = without_dropout(subject)
    module = quiet.module
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad and p.numel()}
    if not trainable:
        ctx.not_applicable("no parameter is trainable")
    ids = ctx.ids(4, subject.longest(40))
    grads = projected_gradients(quiet, ctx, ids)
    for name, grad in grads.items():
        if grad is not None and not bool(grad.isfinite().all()):
            ctx.fail(
                f"gradient of {name} has {int((~grad.isfinite()).sum())} NaN or infinite entries",
                where=name,
                hint="a division by zero or sqrt(0) whose branch torch.where() hides forward, but not backward",
            )
    suspects = unreached(quiet, grads)
    for attempt in range(RETRIES if suspects else 0):
        other = quiet.copy()
        excite(other.module, subject.seed + 1000 + attempt)
        found = unreached(other, projected_gradients(other, ctx, ctx.ids(8, subject.longest(64), salt=attempt + 1)))
        suspects = {name: rows for name, rows in suspects.items() if name in found}
        if not suspects:
            break
    if suspects:
        judge_suspects(subject, ctx, quiet, suspects, grads, ids)
    check_frozen_stay(ctx, quiet, ids, grads)


@register_check(
    "gradients.correct",
    holds="directional derivative equals finite differences in float64, per parameter group",
    requires=REQUIRES,
)
def check_correct(subject: Specimen, ctx: Context) -> None:
    """Central differences with Richardson's extrapolation, per block and per role, in a float64 copy.

    Parts that cast to float32 inside (norms, rotary angles) are kept in float64 by a function mode where that works;
    what rounding is left is measured, and the bound is that noise over the step plus the extrapolation's own
    correction. Of several steps the surest counts. Source: finite-difference gradient checks as in torch.autograd.gradcheck.
    """
    import torch

    wide = subject.copy() if subject.dtype == torch.float64 else subject.twin()
    if wide is None:
        ctx.not_applicable("the model does not run in float64, where finite differences are sharp enough")
        raise AssertionError("unreachable")
    wide = without_dropout(wide)
    ids = ctx.ids(2, subject.longest(20))
    weights = projection(wide, ctx, ids)
    with everything_in_float64(wide, ids):
        grads = projected_gradients(wide, ctx, ids, train=False)
        parameters = {name: p for name, p in wide.module.named_parameters() if grads.get(name) is not None}
        directions = {name: direction(p, ctx, index) for index, (name, p) in enumerate(parameters.items())}
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
        undecided = []
        groups = parameter_groups(wide.module, names)
        for group, members in groups.items():
            products = [float((grads[name] * directions[name]).sum()) for name in members]
            stated = sum(products)
            scale = max(sum(product * product for product in products) ** 0.5, noise)
            measured, bound = surest_difference(lambda step, m=members: value(m, step), noise, scale)
            if not bound <= BLUNT * scale and not abs(measured - stated) > 100 * bound:
                undecided.append(group)
                continue
            ctx.within(
                abs(measured - stated) / scale, bound / scale,
                f"gradient of {group} disagrees with finite differences of the logits (relative)",
                where=f"{group}: backward() says {stated:.6g}, finite differences {measured:.6g}",
                hint="a part of the forward pass is hidden from autograd or replaced in it: detach(), .data, "
                "no_grad(), a straight-through rounding, a hand-written backward(), a hook that scales gradients",
            )  # fmt: skip
    if len(undecided) == len(groups):
        ctx.not_applicable("finite differences decide nothing: the model is not smooth enough, even in float64")
    if undecided:
        ctx.note(f"not smooth enough to decide: {', '.join(undecided)}")


@register_check(
    "gradients.checkpointing",
    holds="gradient checkpointing gives the same values",
    needs=("ckpt",),
    requires=REQUIRES,
    space={"reentrant": Choice(False, True), "cache": Choice("off", "default")},
    grid=({"reentrant": False, "cache": "off"}, {"reentrant": True, "cache": "default"}),
)
def check_checkpointing(subject: Specimen, ctx: Context) -> None:
    """Logits, loss and every gradient with and without checkpointing, in train mode with dropout off: values.

    What transformers' own tests compare is which gradients exist.
    """
    plain = without_dropout(subject)
    ids = ctx.ids(2, subject.longest(24))
    expected_logits, expected_loss, expected = trained_once(plain, ctx, ids, None)
    for case in ctx.cases():
        checked = without_dropout(subject)
        counts = count_calls(checked.module)
        try:
            checked.module.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": case.reentrant}
            )
        except TypeError:  # a model's own method, without transformers' argument
            checked.module.gradient_checkpointing_enable()  # type: ignore[operator]
        use_cache = None if case.cache == "default" else False
        logits, loss, grads = trained_once(checked, ctx, ids, use_cache)
        if not any(count > 1 for count in counts.values()):
            ctx.note("gradient_checkpointing_enable() is taken, but no module was computed again in backward()")
        hint = (
            "the block computes something else the second time: state changed by the first run (a cache, a counter), "
            "a closure over a loop variable, an argument left out of the checkpointed call, or a result of a block "
            "that is never recomputed"
        )
        ctx.equal(logits, expected_logits, "logits with gradient checkpointing differ from those without", hint=hint)
        ctx.within(
            abs(loss - expected_loss), tolerance.allowed(subject.noise, expected_logits),
            "loss with gradient checkpointing differs from that without", hint=hint,
        )  # fmt: skip
        size = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
        spread = max(subject.noise / max(float(expected_logits.abs().max()), 1e-30), tolerance.epsilon(subject.dtype))
        for name, grad in expected.items():
            other = grads.get(name)
            if grad is None and other is None:
                continue
            if grad is None or other is None:
                ctx.fail(
                    f"{name} has a gradient only {'with' if grad is None else 'without'} gradient checkpointing",
                    where=name,
                    hint="with use_reentrant=True no input of the block requires a gradient, or a whole block is cut "
                    "off: call enable_input_require_grads(), or use_reentrant=False",
                )
                raise AssertionError("unreachable")
            ctx.within(
                float((other - grad).abs().max()), tolerance.FACTOR * spread * size,
                "gradients with gradient checkpointing differ from those without", where=name, hint=hint,
            )  # fmt: skip


@register_check(
    "gradients.magnitude",
    holds="norms per layer neither vanish (1e-6) nor explode; ratio first to last layer bounded",
    requires=REQUIRES,
)
def check_magnitude(subject: Specimen, ctx: Context) -> None:
    """Gradient of the cross-entropy against random labels, by block, on weights as the builder leaves them."""
    import torch

    new = subject.fresh(subject.seed) if subject.can("rebuild") else subject.as_loaded()
    found = structure.blocks(new.module)
    if found is None or len(found[1]) < 2:
        ctx.not_applicable("needs two or more repeated blocks in an nn.ModuleList")
        raise AssertionError("unreachable")
    prefix, blocks = found
    ids, labels = ctx.ids(4, subject.longest(40)), ctx.ids(4, subject.longest(40), salt=3)
    logits = new.logits(ids, grad=True).double()
    loss = (logits.logsumexp(-1) - logits.gather(-1, labels[..., None])[..., 0]).mean()
    owners = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
    parameters = [p for owner in owners for p in owner]
    grads = dict(zip(map(id, parameters), torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
    norms = []
    for owner in owners:
        squares = [float(g.double().square().sum()) for p in owner if (g := grads[id(p)]) is not None]
        norms.append(sum(squares) ** 0.5)
    where = "gradient norms by block: " + ", ".join(f"{norm:.2e}" for norm in norms)
    ctx.note(where)


# -- running backward ----------------------------------------------------------------------------------------------


def without_dropout(subject: Specimen) -> Specimen:
    """A copy in which train mode drops nothing: modules, attributes and config fields named dropout are 0."""
    from torch.nn.modules.dropout import _DropoutNd

    quiet = subject.copy()
    configs = {id(c): c for part in quiet.module.modules() if (c := getattr(part, "config", None)) is not None}
    for part in quiet.module.modules():
        if isinstance(part, _DropoutNd):
            part.p = 0.0
        _silence(part)
    for config in configs.values():
        _silence(config)
    return quiet


def _silence(holder: Any) -> None:
    for name, value in list(getattr(holder, "__dict__", {}).items()):
        named = any(word in name.lower() for word in ("drop", "pdrop"))
        if named and isinstance(value, float) and 0 < value < 1:
            setattr(holder, name, 0.0)


def projection(subject: Specimen, ctx: Context, ids: Tensor) -> Tensor:
    """Random weights [batch, time, vocab]: the objective sum(weights * logits) feels every logit."""
    import torch

    shape = (*ids.shape, subject.vocab_size)
    drawn = torch.randn(shape, generator=ctx.generator(5, *shape), dtype=torch.float64)
    return (drawn / drawn.numel() ** 0.5).to(ids.device)


def projected_gradients(
    subject: Specimen, ctx: Context, ids: Tensor, train: bool = True
) -> dict[str, Tensor | None]:
    """Gradient of the random projection of all logits, by trainable parameter; None where there is none."""
    subject.module.zero_grad(set_to_none=True)
    logits = subject.logits(ids, train=train, grad=True)
    if not logits.requires_grad:
        ctx.fail(
            "the logits carry no gradient in train mode",
            hint="forward() runs under no_grad() or inference_mode(), or ends with detach()",
        )
    (logits * projection(subject, ctx, ids).to(logits.dtype)).sum().backward()
    grads = {
        name: None if p.grad is None else p.grad.detach().clone()
        for name, p in subject.module.named_parameters()
        if p.requires_grad and p.numel()
    }
    subject.module.zero_grad(set_to_none=True)
    return grads


def trained_once(
    subject: Specimen, ctx: Context, ids: Tensor, use_cache: bool | None
) -> tuple[Tensor, float, dict[str, Tensor | None]]:
    """Logits, next-token loss and gradients of one training step, computed here from the logits."""
    logits = subject.logits(ids, train=True, grad=True, use_cache=use_cache)
    scores, wanted = logits[:, :-1].double(), ids[:, 1:, None]
    loss = (scores.logsumexp(-1) - scores.gather(-1, wanted)[..., 0]).mean()
    loss.backward()
    grads = {name: p.grad for name, p in subject.module.named_parameters() if p.requires_grad}
    return logits.detach(), float(loss.detach()), grads


def count_calls(module: nn.Module) -> dict[int, int]:
    """Counts, kept up to date, of how often each repeated block runs."""
    counts: dict[int, int] = {}
    found = structure.blocks(module)
    for block in found[1] if found else ():
        for part in block.modules():

            def seen(part: nn.Module, inputs: Any, key: int = id(part)) -> None:
                counts[key] = counts.get(key, 0) + 1

            part.register_forward_pre_hook(seen)
    return counts


# -- parameters that nothing reaches -------------------------------------------------------------------------------


def unreached(subject: Specimen, grads: dict[str, Tensor | None]) -> dict[str, list[int]]:
    """Parameters whose gradient is missing or below rounding, and which rows (all: an empty list)."""
    from torch import nn

    top = max((float(g.abs().max()) for g in grads.values() if g is not None), default=0.0)
    floor = tolerance.FACTOR * tolerance.epsilon(subject.dtype) * top
    linear = {f"{name}.weight" for name, part in subject.module.named_modules() if isinstance(part, nn.Linear)}
    found: dict[str, list[int]] = {}
    for name, grad in grads.items():
        if grad is None or float(grad.abs().max()) <= floor:
            found[name] = []
        elif name in linear:
            rows = (grad.abs().amax(dim=1) <= floor * 1e-3).nonzero().flatten().tolist()
            if rows:
                found[name] = rows
    return found


def judge_suspects(
    subject: Specimen,
    ctx: Context,
    quiet: Specimen,
    suspects: dict[str, list[int]],
    grads: dict[str, Tensor | None],
    ids: Tensor,
) -> None:
    """Violation for each parameter that is neither invariant nor of another modality."""
    import torch

    text = parameters_fed_by_text(subject)
    base = quiet.logits(ids)
    bound = tolerance.allowed(subject.noise, base)
    moved = quiet.copy()
    parameters = dict(moved.module.named_parameters())
    excused: dict[str, list[str]] = {"invariant": [], "other modality": []}
    findings: list[tuple[int, str, str, str, float]] = []
    for index, (name, rows) in enumerate(suspects.items()):
        parameter = parameters[name]
        if text is not None and name not in text and grads[name] is None:
            excused["other modality"].append(name)
            continue
        original = parameter.detach().clone()
        drawn = torch.randn(parameter.shape, generator=ctx.generator(17, index)).to(parameter)
        size = max(float(original.float().square().mean().sqrt()), 0.1)
        with torch.no_grad():
            step = drawn * size
            if rows:
                kept = torch.zeros_like(step)
                kept[rows] = step[rows]
                step = kept
            parameter.add_(step)
            change = float((moved.logits(ids).double() - base.double()).abs().max())
            parameter.copy_(original)
        what = f"{len(rows)} of {len(original)} output rows of {name} get" if rows else f"{name} gets"
        place = name + (f" (rows {', '.join(map(str, rows[:6]))}{', ...' if len(rows) > 6 else ''})" if rows else "")
        if change > bound:
            findings.append((
                0, f"{what} no gradient, although moving the values moves the logits", place,
                "autograd is cut on the way: detach(), .data, no_grad(), argmax or rounding between this parameter "
                "and the logits", change,
            ))  # fmt: skip
        elif grads[name] is None:
            findings.append((
                1, f"{name} gets no gradient: forward() never uses it", place,
                "a layer that was built and is not called, or whose result is not used; remove it, call it, or state "
                "that it is unused with requires_grad_(False)", change,
            ))  # fmt: skip
        elif parameter.dim() <= 1 and name.rpartition(".")[2].endswith("bias"):
            excused["invariant"].append(name)
        else:
            findings.append((
                2, f"{what} no gradient, and moving the values moves no logit: a dead parameter", place,
                "its branch is multiplied by 0, gated off, masked out or overwritten further on", change,
            ))  # fmt: skip
    for reason, names in excused.items():
        if names:
            ctx.note(f"without a gradient, {reason}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    if findings:
        _, message, place, hint, _ = min(findings)
        others = [finding[2] for finding in sorted(findings)[1:5]]
        rest = f"; so do {len(findings) - 1} others: {', '.join(others)}" if others else ""
        ctx.fail(message, where=place + rest, hint=hint)


def parameters_fed_by_text(subject: Specimen) -> set[str] | None:
    """Names of the language model's parameters in a model of several modalities; None for a plain language model."""
    whole, text = getattr(subject.module, "config", None), subject.config
    if whole is None or text is None or whole is text:
        return None
    modules = dict(subject.module.named_modules())
    parts = [name for name, part in modules.items() if getattr(part, "config", None) is text]
    return {name for name, _ in subject.module.named_parameters() if any(name.startswith(f"{part}.") for part in parts)}


def check_frozen_stay(ctx: Context, quiet: Specimen, ids: Tensor, before: dict[str, Tensor | None]) -> None:
    """Freeze every second parameter: it must get no gradient and stay frozen, and the others keep theirs."""
    parameters = {name: p for name, p in quiet.module.named_parameters() if name in before}
    frozen = list(parameters)[1::2]
    for name in frozen:
        parameters[name].requires_grad_(False)
    after = projected_gradients(quiet, ctx, ids)
    thawed = [name for name in frozen if parameters[name].requires_grad or after.get(name) is not None]
    if thawed:
        ctx.fail(
            f"{len(thawed)} parameters that were frozen with requires_grad_(False) are trained again",
            where=", ".join(thawed[:4]),
            hint="forward() or train() sets requires_grad back; freezing is the user's to decide",
        )
    top = max((float(g.abs().max()) for g in before.values() if g is not None), default=0.0)
    for name, grad in after.items():
        old = before[name]
        if (grad is None) != (old is None):
            ctx.fail(
                f"{name} loses its gradient when other parameters are frozen",
                where=name,
                hint="a custom backward() or a checkpointed block returns nothing where one of its inputs is frozen",
            )
        if grad is not None and old is not None:
            ctx.within(
                float((grad - old).abs().max()),
                tolerance.FACTOR * tolerance.epsilon(quiet.dtype) * top,
                "the gradient changes when other parameters are frozen",
                where=name,
                hint="a custom backward() mixes up its inputs where one of them needs no gradient",
            )


# -- finite differences --------------------------------------------------------------------------------------------


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
        yield
        return
    try:
        with mode:
            yield
    finally:
        torch.set_default_dtype(default)


def _is(value: Any, dtypes: tuple[Any, ...]) -> bool:
    return any(value is dtype for dtype in dtypes)


def direction(parameter: Tensor, ctx: Context, index: int) -> Tensor:
    """A random direction of the parameter's own size."""
    import torch

    drawn = torch.randn(parameter.shape, generator=ctx.generator(23, index), dtype=torch.float64)
    size = float(parameter.detach().double().square().mean().sqrt()) or 0.1
    return (drawn * size).to(parameter)


def surest_difference(value: Any, noise: float, scale: float) -> tuple[float, float]:
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


def parameter_groups(module: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """Parameters by block, by role within the blocks, and the rest by module."""
    found = structure.blocks(module)
    prefix = found[0] + "." if found else None
    groups: dict[str, list[str]] = {}
    for name in names:
        if prefix and name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            groups.setdefault(f"block {index}", []).append(name)
            groups.setdefault(f"{rest.partition('.')[0]} of every block", []).append(name)
        else:
            groups.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return groups
