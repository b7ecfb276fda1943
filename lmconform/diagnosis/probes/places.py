"""The first module that does something different in two runs that should agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lmconform.measuring import traces

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.specimen import Specimen

Run = Callable[[], object]
Align = Callable[["Tensor"], "Tensor | None"]  # the part of a module's tensor that must agree; None: not comparable


def first_difference(subject: Specimen, one: tuple[Run, Align], other: tuple[Run, Align], slack: float = 1e-4) -> str:
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


def _differs(left: Tensor | None, right: Tensor | None, slack: float) -> bool:
    if left is None or right is None or left.shape != right.shape or left.numel() == 0:
        return False
    scale = float(right.abs().max())
    return float((left - right).abs().max()) > slack * max(scale, 1e-12)
