"""The first module that does something different in two runs that should agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmconform.measuring import traces

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmconform.specimen import Specimen

Run = Callable[[], object]
Align = Callable[["Tensor"], "Tensor | None"]  # the part of a module's tensor that must agree; None: not comparable
SLACK = 1e-4  # of the largest entry


def first_difference(subject: Specimen, one: tuple[Run, Align], other: tuple[Run, Align], slack: float = SLACK) -> str:
    """The name of the innermost module whose output differs though its input agrees; "" where none does.

    `slack` is relative to the size of the tensor: a fault is far above rounding where it first appears.
    """
    first = traces.recorded(subject, one[0])
    second = traces.recorded(subject, other[0])
    if [call.name for call in first] != [call.name for call in second]:
        return ""
    fallback = ""
    for left, right in zip(first, second):
        if not _differs(one[1](left.output), other[1](right.output), slack):
            continue
        agrees = (
            left.input is not None
            and right.input is not None
            and not _differs(one[1](left.input), other[1](right.input), slack)
        )
        if agrees:
            return left.name
        fallback = fallback or left.name
    return fallback


def along_time(tensor: Tensor, batch: int, *lengths: int) -> Tensor | None:
    """[batch, time, ...], turned so where it is [time, batch, ...]; None where no time of these `lengths` is found."""
    if tensor.dim() >= 2 and tensor.shape[1] in lengths:
        return tensor
    if tensor.dim() >= 2 and tensor.shape[0] in lengths and tensor.shape[1] == batch:
        return tensor.transpose(0, 1)
    return None


def norm_over_time(subject: Specimen, place: str, ids: Tensor) -> bool:
    """Whether `place` is a norm, by its class or one that it is made from, that lets later tokens into earlier ones.

    `ids` [batch, time] are run to have an input for it, whose second half is then changed. False where it is not called
    as norm(x, ...) -> tensor.
    """
    import torch

    part = subject.module.get_submodule(place)
    if not place or not any("norm" in kind.__name__.lower() for kind in type(part).__mro__):
        return False
    batch, time = ids.shape
    half = time // 2
    mixed: list[bool] = []

    def again(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if not args or not all(isinstance(each, torch.Tensor) for each in (args[0], output)):
            return
        changed = args[0].clone()
        inside = along_time(changed, batch, time)
        if inside is None:
            return
        inside[:, half:] *= -2
        before, after = (
            along_time(tensor, batch, time) for tensor in (output, module.forward(changed, *args[1:], **keywords))
        )
        if before is not None and after is not None:
            mixed.append(_differs(before[:, :half], after[:, :half], SLACK))

    with traces.hooked(part.register_forward_hook(again, with_kwargs=True)):
        subject.logits(ids)
    return any(mixed)


def _differs(left: Tensor | None, right: Tensor | None, slack: float) -> bool:
    if left is None or right is None or left.shape != right.shape or left.numel() == 0:
        return False
    scale = float(right.abs().max())
    return float((left - right).abs().max()) > slack * max(scale, 1e-12)
