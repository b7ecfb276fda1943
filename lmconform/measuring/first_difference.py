"""Where two models first differ: their residual streams side by side, and the first module inside a block.

Nothing is registered here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmconform import tolerance
from lmconform.context import Hint, Unavailable
from lmconform.measuring import traces
from lmconform.measuring.pairing import pair_parameters, unclaimed

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen


def both_streams(ctx: Context, ours: Specimen, theirs: Specimen, ids: Tensor) -> tuple[traces.Stream, traces.Stream]:
    """The residual streams of both for `ids` [batch, time].

    Fails the check where they differ in blocks or width; raises Unavailable where one of them cannot be read.
    """
    mine, expected = traces.stream(ours, ids), traces.stream(theirs, ids.to(theirs.device))
    for what, trace in (("subject", mine), ("reference", expected)):
        if trace is None:
            raise Unavailable(f"no repeated blocks were found in the {what}, and its forward() gives no hidden states")
    assert mine is not None
    assert expected is not None
    if len(mine.states) != len(expected.states):
        ctx.fail(
            f"the model has {len(mine.states) - 1} blocks, the reference {len(expected.states) - 1}",
            where=f"{mine.names[-1]} (reference: {expected.names[-1]})",
            hint=Hint("the config was not carried over, or a block was left out or added", "weights.not_loaded"),
        )
    if mine.states[0].shape[-1] != expected.states[0].shape[-1]:
        ctx.fail(
            f"hidden states are {mine.states[0].shape[-1]} wide, the reference's {expected.states[0].shape[-1]}",
            where=mine.names[0],
            hint="the config was not carried over",
        )
    return mine, expected


def stream_noise(specimen: Specimen, ids: Tensor, base: traces.Stream) -> list[float]:
    """Per state, what rounding does to it: the distance to the float64 copy, else to weights moved by one unit."""
    moved = traces.stream(tolerance.other_rounding(specimen), ids.to(specimen.device))
    assert moved is not None
    return [tolerance.typical(a.double() - b.double()) for a, b in zip(base.states, moved.states)]


def first_module(ours: Specimen, theirs: Specimen, ids: Tensor, block: str, other: str, slack: float) -> str:
    """Which module in `block` of ours first gives something that is found nowhere in `other`, the reference's block.

    `slack` is the share of a value's peak by which it may differ. An empty text where none is found.
    A module that is given nothing (an expert that no token chose) is passed by.
    What the reference never computes by itself, one head's share of the output, is no fault: a module is cleared where
    one behind it, which depends on it, agrees again.
    """
    mine = [call for call in traces.calls(ours, ids) if call.name.startswith(block + ".") and call.output.numel()]
    given = [call for call in traces.calls(theirs, ids.to(theirs.device)) if call.name.startswith(other + ".")]
    known = [call.output for call in given] + [call.input for call in given if call.input is not None]

    def found(value: Tensor | None) -> bool | None:
        return None if value is None or not value.numel() else any(_holds(whole, value, slack) for whole in known)

    agrees = [found(call.output) for call in mine]
    pool = [value.cpu().double().flatten(2) for value in known if value.dim() >= 3 and value.shape[:2] == ids.shape]
    reordered = ""
    for place, call in enumerate(mine):
        if agrees[place]:
            continue
        behind = {later.name for later, same in zip(mine[place + 1 :], agrees[place + 1 :]) if same}
        if behind and _moved_by(ours, ids, call.name, behind, mine):
            continue
        if _reordered(pool, call.output, slack):
            reordered = call.name
            continue
        if call.input is not None and found(call.input) is False:
            if call.input.dim() == 3 and any(_holds(v[:, :1], call.input[:, :1], slack) for v in known if v.dim() == 3):
                return Hint(
                    f"what goes into {call.name} is found nowhere in {other}, except at position 0, where attention "
                    "sees one token; every module before it agrees: look at the attention scores (position encoding, "
                    "its share of each head, scale) and the mask",
                    "position.layout",
                    "position.rates",
                    "position.base_kept",
                    "attention.unscaled",
                    "mask.window",
                )
            if reordered:
                return Hint(
                    f"what goes into {call.name} is found nowhere in {other}, and {reordered} before it gives the "
                    "channels of the reference in another order: heads, or q, k and v, are laid out otherwise than the "
                    "code behind it reads them (parity.transfer says which); or that code differs",
                    "weights.sliced_wrong",
                    "attention.heads_scrambled",
                    "position.layout",
                    "attention.kv_groups",
                )
            return Hint(
                f"what goes into {call.name} is found nowhere in {other}, and every module before it agrees: look at "
                "the code between the last module that agrees and this one (activation, heads and the keys and "
                "values they read, attention scores, mask, positions)",
                "activation.differs",
                "position.layout",
                "attention.kv_groups",
                "attention.heads_scrambled",
                "attention.unscaled",
            )
        matrices = [n for n, p in ours.module.get_submodule(call.name).named_parameters() if p.dim() > 1]
        lost = set(unclaimed(ours.module, pair_parameters(ours.module, theirs.module)))
        there = not any(f"{call.name}.{matrix}" in lost for matrix in matrices)
        weights = ("weights.sliced_wrong", "weights.not_loaded") if there else ("weights.not_loaded",)
        return Hint(
            f"{call.name} takes an input that the reference has too and gives an output that is found nowhere in "
            f"{other}: its weights or its settings (eps, bias, activation)",
            *(weights if matrices else ("norm.epsilon", "weights.not_loaded")),
        )
    return ""


def _moved_by(ours: Specimen, ids: Tensor, name: str, behind: set[str], before: list[traces.Call]) -> bool:
    """Whether any of the modules `behind` gives something else once the output of module `name` is changed."""
    import torch

    def change(module: object, args: object, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(first, torch.Tensor) or not first.numel():
            return output
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
        moved = first + 0.1 * first.abs().max() * noise
        return type(output)((moved, *output[1:])) if isinstance(output, tuple | list) else moved

    with traces.hooked(ours.module.get_submodule(name).register_forward_hook(change)):
        after = {call.name: call.output for call in traces.calls(ours, ids)}
    return any(call.name in behind and not torch.equal(call.output, after[call.name]) for call in before)


def _holds(whole: Tensor, value: Tensor, slack: float) -> bool:
    """Whether `value` is `whole`, or a slice of its last axis (a fused projection), up to reshaping."""
    import torch

    whole, value = whole.cpu().double(), value.cpu().double()
    bound = slack * float(value.abs().max())
    if whole.numel() == value.numel():
        return bool(torch.isclose(whole.flatten(), value.flatten(), rtol=0, atol=bound).all())
    if whole.shape[:-1] != value.shape[:-1] or whole.shape[-1] < value.shape[-1]:
        return False
    width = value.shape[-1]
    return any(
        bool(((whole[..., start : start + width] - value).abs() <= bound).all())
        for start in range(0, whole.shape[-1] - width + 1, width)
    )


def _reordered(pool: list[Tensor], value: Tensor, slack: float) -> bool:
    """Whether every channel of `value` [batch, time, ...] is one in the pool: fused, split or permuted projections."""
    import torch

    if not pool or value.dim() < 3 or value.shape[:2] != pool[0].shape[:2]:
        return False
    channels = value.cpu().double().flatten(2).flatten(0, 1).T  # [channel, batch * time]
    bound = slack * float(value.abs().max())
    left = torch.ones(len(channels), dtype=torch.bool)
    for whole in pool:
        apart = torch.cdist(channels[left], whole.flatten(0, 1).T.contiguous(), p=float("inf"))
        left[left.clone()] = apart.amin(-1) > bound
        if not bool(left.any()):
            return True
    return False
