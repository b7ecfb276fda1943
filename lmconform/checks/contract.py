"""contract: what every causal language model's forward() promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.cases import Choice, Span
from lmconform.context import Hint
from lmconform.registry import register_check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.context import Context
    from lmconform.specimen import Specimen


@register_check(
    "contract.shape",
    holds="logits are [batch, time, vocab], floating, for time 1 and up",
    profile="smoke",
    requires=(),
    space={"batch": Span(1, 4), "time": Span(1, 40)},
    grid=({"batch": 1, "time": 1}, {"batch": 3, "time": 1}, {"batch": 1, "time": 7}, {"batch": 3, "time": 40}),
)
def check_shape(subject: Specimen, ctx: Context) -> None:
    """Batch 1 and 3, time 1 to 40: a squeezed dimension shows at size 1."""
    for case in ctx.cases():
        ids = ctx.ids(case.batch, subject.longest(case.time))
        logits = subject.logits(ids)
        expected = [*ids.shape, subject.vocab_size]
        if list(logits.shape) != expected:
            ctx.fail(
                f"logits are {list(logits.shape)}, expected [batch, time, vocab] = {expected}",
                hint=Hint("a squeeze() or a view that drops a dimension of size 1", "contract.shape_wrong"),
            )
        if not logits.is_floating_point():
            ctx.fail(f"logits are {logits.dtype}, expected a floating type")


@register_check(
    "contract.finite",
    holds="no NaN or infinity, for usual, long and extreme-but-legal input",
    profile="smoke",
    space={"kind": Choice("usual", "same_token", "first_id", "last_id", "long"), "time": Span(1, 128)},
    grid=(
        {"kind": "usual", "time": 20},
        {"kind": "same_token", "time": 40},
        {"kind": "first_id", "time": 3},
        {"kind": "last_id", "time": 3},
        {"kind": "long", "time": 128},
    ),
)
def check_finite(subject: Specimen, ctx: Context) -> None:
    """Usual text, one token over and over, the first and the last id of the vocabulary, the whole context."""
    for case in ctx.cases():
        ids = ctx.ids(2, subject.longest(case.time))
        if case.kind == "same_token":
            ids = ids[:1, :1].expand_as(ids).contiguous()
        elif case.kind == "first_id":
            ids = ids.clone().fill_(0)
        elif case.kind == "last_id":
            ids = ids.clone().fill_(subject.vocab_size - 1)
        logits = subject.logits(ids)
        bad = ~logits.isfinite()
        if bool(bad.any()):
            row, position, token = bad.nonzero()[0].tolist()
            ctx.fail(
                f"{int(bad.sum())} of {bad.numel()} logits are NaN or infinite on {case.kind} input",
                where=f"row {row}, position {position}, token {token}",
                hint=Hint(
                    "a division by zero, a softmax over a fully masked row, or an overflow",
                    "norm.epsilon",
                    "mask.padding_nan",
                ),
            )


@register_check(
    "contract.repeatable",
    holds="two eval calls agree bit for bit; nothing is carried from call to call",
    profile="smoke",
    space={
        "between": Choice("nothing", "other_tokens", "longer", "padded", "cached", "since_built"),
        "time": Span(1, 64),
    },
    grid=(
        {"between": "since_built", "time": 40},
        {"between": "nothing", "time": 40},
        {"between": "other_tokens", "time": 40},
        {"between": "longer", "time": 40},
        {"between": "padded", "time": 40},
        {"between": "cached", "time": 40},
    ),
)
def check_repeatable(subject: Specimen, ctx: Context) -> None:
    """The same tokens twice, at once and with an unrelated call between; the weights before and after.

    `since_built`: the first answer of a model built anew, given these weights, against the subject's, which has taken
    other tokens before, among them a text of its whole context where no context is stated.
    """
    weights = {name: tensor.detach().clone() for name, tensor in _tensors(subject.module)}
    trained = {name for name, _ in subject.module.named_parameters(remove_duplicate=False)}
    first: dict[int, Tensor] = {}
    for case in ctx.cases():
        ids = ctx.ids(2, subject.longest(case.time))
        if ids.shape[1] not in first:
            first[ids.shape[1]] = subject.logits(ids)
        if case.between == "since_built":
            _as_when_built(subject, ctx, ids, first[ids.shape[1]])
            continue
        _unrelated_call(subject, ctx, case.between, ids)
        changed = [name for name, tensor in _tensors(subject.module) if _moved(weights.get(name), tensor)]
        if parameters := [name for name in changed if name in trained]:
            ctx.fail(
                f"a forward in eval mode changed the model's own weights: {', '.join(parameters[:3])}"
                + (f" and {len(parameters) - 3} more" if len(parameters) > 3 else ""),
                hint=Hint(
                    "an in-place operation on a parameter (add_, mul_, copy_ on .data) inside forward()",
                    "state.carried_over",
                ),
            )
        again = subject.logits(ids)
        if not _same_bits(first[ids.shape[1]], again):
            _differs_again(subject, ctx, case.between, ids, first[ids.shape[1]], again, changed)
        if changed:
            ctx.note(f"forward() in eval mode changes the buffer {changed[0]}, without effect on these logits")


def _as_when_built(subject: Specimen, ctx: Context, ids: Tensor, logits: Tensor) -> None:
    """What is built anew and answers otherwise at its second call as well is for other checks to judge."""
    import torch

    if subject.builder is None or subject.is_large:  # then all that can be had is a copy, what was left included
        return
    built = subject.unused()
    anew = built.logits(ids)
    if anew.shape != logits.shape or not float((logits - anew).abs().max()) > tolerance.allowed(subject.noise, anew):
        return
    built.logits(ctx.other_ids(ids))
    if not torch.equal(anew, built.logits(ids)) or not torch.equal(anew, subject.unused().logits(ids)):
        return
    ctx.equal(
        logits,
        anew,
        "the same tokens give other logits than in a model that has answered nothing before: something is carried "
        "from call to call",
        hint=Hint(
            "state kept on the module or its config from an earlier call (a length, a cache, a rotary base that a long "
            "text has stretched)",
            "state.carried_over",
        ),
    )


def _unrelated_call(subject: Specimen, ctx: Context, between: str, ids: Tensor) -> None:
    import torch

    if between == "other_tokens":
        subject.logits(ctx.other_ids(ids))
    elif between == "longer":
        subject.logits(ctx.ids(3, subject.longest(2 * ids.shape[1] + 1), salt=7))
    elif between == "padded" and subject.convention.mask is not None:
        mask = torch.ones_like(ids)
        mask[:, : ids.shape[1] // 2] = 0
        _tolerating_errors(subject, ctx, ctx.other_ids(ids), mask=mask)
    elif between == "cached" and subject.convention.cache is not None:
        _tolerating_errors(subject, ctx, ctx.other_ids(ids), use_cache=True)


def _tolerating_errors(subject: Specimen, ctx: Context, ids: Tensor, **inputs: Any) -> None:
    """A masked or cached call that raises is a finding of those families and says nothing about repeatability."""
    try:
        subject.forward(ids, **inputs)
    except Exception as error:
        ctx.note(f"a call with {', '.join(inputs)} between raised {type(error).__name__}")


def _differs_again(
    subject: Specimen, ctx: Context, between: str, ids: Tensor, first: Tensor, again: Tensor, changed: list[str]
) -> None:
    import torch

    if first.shape != again.shape:
        ctx.fail(f"the same tokens gave logits {list(first.shape)}, then {list(again.shape)}")
    size = float((first.double() - again.double()).abs().nan_to_num(nan=float("inf")).max())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one = subject.logits(ids)
        torch.manual_seed(0)
        same = _same_bits(one, subject.logits(ids))
        random = same and not _same_bits(one, subject.logits(ids))
    if not same and ids.device.type != "cpu" and not changed:  # kernels that sum in another order each time
        ctx.equal(again, first, "two eval calls on the same tokens differ by more than the device's own reordering")
        ctx.note(f"{ids.device.type} gives other bits on each call (up to {size:.3g}), within rounding")
        return
    row, position, _ = (first != again).nonzero()[0].tolist()
    where = f"row {row}, position {position} first"
    if random:
        hint = Hint(
            "dropout (or other noise) is active in eval: pass training=self.training to F.dropout, or use nn.Dropout",
            "dropout.in_eval",
        )
        ctx.fail("two eval calls on the same tokens give different logits: they depend on the random state",
                 measured=size, allowed=0.0, where=where, hint=hint)  # fmt: skip
    if changed:
        hint = Hint(f"forward() writes to the buffer {changed[0]} in eval mode", "state.carried_over")
    else:
        hint = Hint(
            "state kept on the module from the call before (a cache, a mask or positions stored as an attribute)",
            "state.carried_over",
        )
    then = {"nothing": "", "other_tokens": " after a call on other tokens", "longer": " after a longer call",
            "padded": " after a call with padding", "cached": " after a call with use_cache"}[between]  # fmt: skip
    ctx.fail(f"the same tokens give different logits the second time{then}: something is carried from call to call",
             measured=size, allowed=0.0, where=where, hint=hint)  # fmt: skip


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    import torch

    return [(name, tensor) for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)]


def _moved(before: Tensor | None, now: Tensor) -> bool:
    return before is not None and not _same_bits(before, now)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in shape and in every value; NaN equals NaN."""
    import torch

    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
