"""gradients: what backward() leaves on the parameters is there, is right, and has a sane size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lmconform import structure, tolerance
from lmconform.cases import Choice
from lmconform.checks.unused_parameters import declared_unused, reached_by_loss, reached_by_other_outputs
from lmconform.context import Hint
from lmconform.excitation import excite
from lmconform.measuring.buffers import buffers_kept
from lmconform.measuring.dropout import without_dropout
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen

CHOOSES = 3.0  # times the excited matrices: routers that are sure
FORBIDS = 100.0  # an entry this large beside a router's scores is a mask
RETRIES = 3  # other random weights under which a parameter may be reached after all


@register_check(
    "gradients.reach",
    holds="every trainable parameter gets a finite gradient above noise, or is shown to be invariant or unused for a "
    "declared reason; what is frozen stays",
    requires=COMPARES_LOGITS,
    profile="smoke",
)
def check_reach(subject: Specimen, ctx: Context) -> None:
    """A random projection of all logits goes backward, in train mode with dropout off.

    A parameter without a gradient is tried again under other random weights and more tokens (experts that were not
    routed to, dead ReLUs), and with routers that favour nobody; then it is moved: a bias that moves no logit (a key
    bias under softmax) is invariant and excused, a matrix that moves none is dead, and whatever moves logits without
    having a gradient is cut off. Excused with a note: towers of other modalities, cross-attention where no encoder's
    states are given, and what only the model's own loss reaches (a head that predicts further tokens in training), or
    another output of forward() than the logits (a value head).
    """
    quiet = without_dropout(subject, lent=True)
    module = quiet.module
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad and p.numel()}
    if not trainable:
        ctx.not_applicable("no parameter is trainable")
    ids = ctx.ids(4, subject.longest(40))
    grads = projected_gradients(quiet, ctx, ids)
    broken = [name for name, grad in grads.items() if grad is not None and not bool(grad.isfinite().all())]
    if broken:
        ctx.fail(
            f"gradients are NaN or infinite, of {len(broken)} parameters; the last in the model is {broken[-1]}",
            where=f"{broken[-1]}; what comes before it inherits the fault",
            hint=Hint(
                "a division by zero or a sqrt(0) whose branch torch.where() hides forward, but not backward",
                "grad.exploding",
            ),
        )
    suspects = unreached(quiet, grads)
    for attempt in range(2 * RETRIES):
        last_resort = attempt >= RETRIES
        if not suspects or (last_resort and all(_is_bias(name, trainable[name]) for name in suspects)):
            break  # a bias without a gradient has none whichever expert is chosen
        seed = subject.seed + 1000 + attempt
        other = without_dropout(subject.fresh(seed)) if subject.can("rebuild") else quiet.copy()
        excite(other.module, seed)
        if last_resort:
            even_choices(other.module)
        found = projected_gradients(other, ctx, ctx.ids(8, subject.longest(64), salt=attempt + 1))
        if all(grad is None or bool(grad.isfinite().all()) for grad in found.values()):
            suspects = still_unreached(suspects, unreached(other, found))
    if suspects:
        judge_suspects(subject, ctx, quiet, suspects, grads, ids)
    check_frozen_stay(ctx, quiet, ids, grads)


@register_check(
    "gradients.checkpointing",
    holds="gradient checkpointing gives the same values, what dropout draws included",
    needs=("ckpt",),
    requires=COMPARES_LOGITS,
    space={"reentrant": Choice(False, True), "cache": Choice("off", "default"), "dropout": Choice("off", "on")},
    grid=(
        {"reentrant": False, "cache": "off", "dropout": "off"},
        {"reentrant": True, "cache": "default", "dropout": "off"},
        {"reentrant": False, "cache": "off", "dropout": "on"},
    ),
)
def check_checkpointing(subject: Specimen, ctx: Context) -> None:
    """Logits, loss and every gradient with and without checkpointing, in train mode: values.

    Dropout is off, or as the model has it, with the same random numbers for both. What transformers' own tests compare
    is which gradients exist.
    """
    ids = ctx.ids(2, subject.longest(24))
    without: dict[str, tuple[Tensor, float, dict[str, Tensor | None]]] = {}
    for case in ctx.cases():
        if case.dropout not in without:
            without[case.dropout] = trained_once(_copied(subject, case.dropout), ctx, ids, None)
        expected_logits, expected_loss, expected = without[case.dropout]
        if case.dropout == "on" and "off" in without and _alike(subject, expected_logits, without["off"][0]):
            continue  # the model has none
        if case.dropout == "on" and not _repeats(_copied(subject, "on"), ctx, ids, expected_logits):
            ctx.note("train mode draws other random numbers each time: compared without dropout alone")
            continue
        checked = _copied(subject, case.dropout)
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
        hint = Hint(
            "the block computes something else the second time: state changed by the first run (a cache, a counter), "
            "a closure over a loop variable, an argument left out of the checkpointed call, or a result of a block "
            "that is never recomputed"
            if case.dropout == "off"
            else "dropout draws anew when the block is computed again: preserve_rng_state=True, which is the default, "
            "and random numbers of torch's own generator alone",
            "grad.checkpoint_differs",
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
                    hint=Hint(
                        "with use_reentrant=True no input of the block requires a gradient, or a whole block is cut "
                        "off: call enable_input_require_grads(), or use_reentrant=False",
                        "grad.checkpoint_differs",
                    ),
                )
                raise AssertionError("unreachable")
            ctx.within(
                float((other - grad).abs().max()), tolerance.FACTOR * spread * size,
                "gradients with gradient checkpointing differ from those without", where=name, hint=hint,
            )  # fmt: skip


def projection(subject: Specimen, ctx: Context, ids: Tensor) -> Tensor:
    """Random weights [batch, time, vocab]: the objective sum(weights * logits) feels every logit."""
    import torch

    shape = (*ids.shape, subject.vocab_size)
    drawn = torch.randn(shape, generator=ctx.generator(5, *shape), dtype=torch.float64)
    return (drawn / drawn.numel() ** 0.5).to(ids.device)


def projected_gradients(subject: Specimen, ctx: Context, ids: Tensor, train: bool = True) -> dict[str, Tensor | None]:
    """Gradient of the random projection of all logits, by trainable parameter; None where there is none.

    Buffers are left as they were: a model may learn in them in train mode (batch statistics, the balance of experts).
    """
    import torch

    subject.module.zero_grad(set_to_none=True)
    torch.manual_seed(subject.seed)  # train mode may draw (routers that sample experts): the same each time
    with buffers_kept(subject.module):
        logits = subject.logits(ids, train=train, grad=True)
        if not logits.requires_grad:
            ctx.fail(
                "the logits carry no gradient in train mode",
                hint=Hint("forward() runs under no_grad() or inference_mode(), or ends with detach()", "grad.frozen"),
            )
        (logits * projection(subject, ctx, ids).to(logits.dtype)).sum().backward()
    grads = {
        name: None if p.grad is None else p.grad.detach()  # let go of by the module below: no copy is needed
        for name, p in subject.module.named_parameters()
        if p.requires_grad and p.numel()
    }
    for parameter in subject.module.parameters():  # not zero_grad(), which a model may have of its own
        parameter.grad = None
    return grads


def trained_once(
    subject: Specimen, ctx: Context, ids: Tensor, use_cache: bool | None
) -> tuple[Tensor, float, dict[str, Tensor | None]]:
    """Logits, next-token loss and gradients of one training step, computed here from the logits."""
    import torch

    torch.manual_seed(subject.seed)
    logits = subject.logits(ids, train=True, grad=True, use_cache=use_cache)
    scores, wanted = logits[:, :-1].double(), ids[:, 1:, None]
    loss = (scores.logsumexp(-1) - scores.gather(-1, wanted)[..., 0]).mean()
    loss.backward()
    grads = {name: p.grad for name, p in subject.module.named_parameters() if p.requires_grad}
    return logits.detach(), float(loss.detach()), grads


def _copied(subject: Specimen, dropout: str) -> Specimen:
    return without_dropout(subject, lent=True) if dropout == "off" else subject.lent()


def _repeats(subject: Specimen, ctx: Context, ids: Tensor, expected: Tensor) -> bool:
    """Whether train mode gives these logits again from the same seed."""
    return _alike(subject, trained_once(subject, ctx, ids, None)[0], expected)


def _alike(subject: Specimen, logits: Tensor, expected: Tensor) -> bool:
    return float((logits - expected).abs().max()) <= tolerance.allowed(subject.noise, expected)


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
    """Parameters whose gradient is missing or below rounding, and which features (all: an empty list).

    Features are the output rows of a linear layer and the columns of an embedding table. In half precision rounding is
    as large as many a gradient: only what is exactly 0 counts there.
    """
    from torch import nn

    top = max((float(g.abs().max()) for g in grads.values() if g is not None), default=0.0)
    floor = 0.0 if tolerance.is_half(subject.dtype) else tolerance.FACTOR * tolerance.epsilon(subject.dtype) * top
    linear = {f"{name}.weight" for name, part in subject.module.named_modules() if isinstance(part, nn.Linear)}
    tables = embedding_tables(subject)
    found: dict[str, list[int]] = {}
    for name, grad in grads.items():
        if grad is None or float(grad.abs().max()) <= floor:
            found[name] = []
        elif name in linear:
            rows = (grad.abs().amax(dim=1) <= floor * 1e-3).nonzero().flatten().tolist()
            if rows:
                found[name] = rows
        elif name in tables:
            columns = (grad.abs().amax(dim=0) <= floor).nonzero().flatten().tolist()
            if columns:
                found[name] = columns
    return found


def embedding_tables(subject: Specimen) -> set[str]:
    """Names of the weights of embeddings: their rows are tokens, their columns features."""
    from torch import nn

    return {f"{name}.weight" for name, part in subject.module.named_modules() if isinstance(part, nn.Embedding)}


def still_unreached(before: dict[str, list[int]], now: dict[str, list[int]]) -> dict[str, list[int]]:
    """What was unreached both times; of a parameter only the features that were."""
    left: dict[str, list[int]] = {}
    for name, rows in before.items():
        if name not in now:
            continue
        both = sorted(set(rows) & set(now[name])) if rows and now[name] else rows or now[name]
        if both or not (rows or now[name]):
            left[name] = both
    return left


def judge_suspects(
    subject: Specimen,
    ctx: Context,
    quiet: Specimen,
    suspects: dict[str, list[int]],
    grads: dict[str, Tensor | None],
    ids: Tensor,
) -> None:
    """Violation for each parameter that is neither invariant nor unused for a declared reason."""
    import torch

    base = quiet.logits(ids)
    bound = tolerance.allowed(subject.noise, base)
    moved = quiet.copy()
    parameters = dict(moved.module.named_parameters())
    excused = declared_unused(quiet, [name for name in suspects if grads[name] is None], ids, base, bound)
    unused = {name for names in excused.values() for name in names}
    excused["invariant"] = []
    excused["which the model's own loss in train mode reaches beside the logits"] = of_the_loss = []
    excused["which reaches another output of forward(), beside the logits"] = of_outputs = []
    in_doubt = bool(set(suspects) - unused)
    reached = reached_by_loss(quiet, ids) if in_doubt else frozenset()
    reaching = reached_by_other_outputs(quiet, ids) if in_doubt else frozenset()
    findings: list[tuple[int, int, str, str, str]] = []
    tables = embedding_tables(quiet)
    for index, (name, rows) in enumerate(suspects.items()):
        parameter = parameters[name]
        kind, axis = ("column", 1) if name in tables else ("row", 0)
        if name in unused:
            continue
        original = parameter.detach().clone()
        drawn = torch.randn(parameter.shape, generator=ctx.generator(17, index)).to(parameter)
        size = max(float(original.float().square().mean().sqrt()), 0.1)
        with torch.no_grad():
            step = drawn * size
            if rows:
                kept = torch.zeros_like(step)
                chosen = torch.tensor(rows, device=step.device)
                step = kept.index_copy(axis, chosen, step.index_select(axis, chosen))
            parameter.add_(step)
            change = float((moved.logits(ids).double() - base.double()).abs().max())
            parameter.copy_(original)
        what, place = f"{name} gets", name
        if rows:
            features = "output rows" if axis == 0 else "columns"
            what = f"{len(rows)} of {original.shape[axis]} {features} of {name} get"
            place += f" ({kind}s {', '.join(map(str, rows[:6]))}{', ...' if len(rows) > 6 else ''})"
        order = index - 2 * parameter.dim()  # matrices before the biases beside them
        if change > bound:
            findings.append((
                0, order, f"{what} no gradient, although moving the values moves the logits", place,
                Hint(
                    "autograd is cut on the way: detach(), .data, no_grad(), argmax or rounding between this parameter "
                    "and the logits",
                    "grad.dead_parameter",
                ),
            ))  # fmt: skip
        elif name in reached and not rows:
            of_the_loss.append(name)
        elif name in reaching and not rows:
            of_outputs.append(name)
        elif grads[name] is None:
            findings.append((
                1, order, f"{name} gets no gradient: forward() never uses it for the logits", place,
                Hint(
                    "a layer that was built and is not called, or whose result is not used; remove it, call it, or "
                    "state that it is unused with requires_grad_(False)",
                    "grad.dead_parameter",
                ),
            ))  # fmt: skip
        elif _is_bias(name, parameter):
            excused["invariant"].append(name)
        else:
            findings.append((
                2, order, f"{what} no gradient, and moving the values moves no logit: a dead parameter", place,
                Hint(
                    "its branch is multiplied by 0, gated off, masked out or overwritten further on",
                    "grad.dead_parameter",
                    "attention.gated_off",
                ),
            ))  # fmt: skip
    if findings:
        findings.sort()
        _, _, message, place, hint = findings[0]
        others = [finding[3] for finding in findings[1:]]
        more = f"; {len(others)} more: {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}" if others else ""
        ctx.fail(message, where=place + more, hint=hint)
    for reason, names in excused.items():
        if names:
            ctx.note(f"without a gradient, {reason}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")


def even_choices(module: nn.Module) -> None:
    """Routers favour nobody: matrices grow, so that they decide, and vectors, a router's bias among them, are levelled.

    For an expert that random weights do not choose. What is -inf, or as good as that, forbids a choice: it stays.
    """
    import torch

    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            if tensor.dim() == 1 and float(tensor.abs().max()) < FORBIDS:
                tensor.fill_(float(tensor.float().mean()))
            elif tensor.dim() == 2 and isinstance(tensor, torch.nn.Parameter):
                tensor.mul_(CHOOSES)


def _is_bias(name: str, parameter: Tensor) -> bool:
    """A vector called bias, or TransformerLens' b_K [heads, size]."""
    leaf = name.rpartition(".")[2]
    return (parameter.dim() <= 1 and leaf.endswith("bias")) or (parameter.dim() == 2 and leaf.startswith("b_"))


def check_frozen_stay(ctx: Context, quiet: Specimen, ids: Tensor, before: dict[str, Tensor | None]) -> None:
    """Freeze every second parameter: it must get no gradient and stay frozen, and the others keep theirs.

    The gradients that the frozen ones had are dropped from `before`: of a large model two sets do not fit. For the same
    reason the others' are copied only where the model keeps its gradients' memory, so that both passes wrote to it.
    """
    top = max((float(g.abs().max()) for g in before.values() if g is not None), default=0.0)
    parameters = {name: p for name, p in quiet.module.named_parameters() if name in before}
    frozen = list(parameters)[1::2]
    for name in frozen:
        parameters[name].requires_grad_(False)
        del before[name]
    after = projected_gradients(quiet, ctx, ids)
    if any(_one_memory(before.get(name), grad) for name, grad in after.items()):  # nothing is left to compare with
        for name in frozen:
            parameters[name].requires_grad_(True)
        again = projected_gradients(quiet, ctx, ids)
        before = {name: None if grad is None else grad.clone() for name, grad in again.items() if name in before}
        for name in frozen:
            parameters[name].requires_grad_(False)
        after = projected_gradients(quiet, ctx, ids)
    thawed = [name for name in frozen if parameters[name].requires_grad or after.get(name) is not None]
    if thawed:
        ctx.fail(
            f"{len(thawed)} parameters that were frozen with requires_grad_(False) are trained again",
            where=", ".join(thawed[:4]),
            hint=Hint("forward() or train() sets requires_grad back; freezing is the user's to decide", "grad.frozen"),
        )
    for name, grad in after.items():
        old = before[name]
        if (grad is None) != (old is None):
            ctx.fail(
                f"{name} loses its gradient when other parameters are frozen",
                where=name,
                hint=Hint(
                    "a custom backward() or a checkpointed block returns nothing where one of its inputs is frozen",
                    "grad.wrong",
                ),
            )
        if grad is None or old is None:
            continue
        change, bound = float((grad - old).abs().max()), tolerance.FACTOR * tolerance.epsilon(quiet.dtype) * top
        if change > bound:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            _check_same_again(ctx, quiet, ids, name, old, bound)
        ctx.within(
            change,
            bound,
            "the gradient changes when other parameters are frozen",
            where=name,
            hint=Hint("a custom backward() mixes up its inputs where one of them needs no gradient", "grad.wrong"),
        )


def _one_memory(before: Tensor | None, after: Tensor | None) -> bool:
    """Whether one backward() wrote over what another one had left, in memory that the model keeps for its gradients."""
    if before is None or after is None:
        return False
    kept = before.untyped_storage().data_ptr()
    return kept == after.untyped_storage().data_ptr() != 0


def _check_same_again(ctx: Context, quiet: Specimen, ids: Tensor, name: str, old: Tensor, bound: float) -> None:
    """Nothing is frozen any more: a difference to the first call is no matter of freezing."""
    again = projected_gradients(quiet, ctx, ids)[name]
    ctx.within(
        math.inf if again is None else float((again - old).abs().max()),
        bound,
        "the gradient of one batch changes from call to call in train mode, dropout off",
        where=name,
        hint=Hint(
            "forward() counts its calls, keeps a running average or writes to its weights: what was computed before "
            "decides what comes now",
            "state.carried_over",
            "grad.checkpoint_differs",
            "training.resume_differs",
        ),
    )
