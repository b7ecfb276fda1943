"""causality: what is computed for a token does not depend on how long the text is that it stands in."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lmconform import tolerance
from lmconform.cases import Choice, Span
from lmconform.checks.positions_shift import BY_LENGTH, frequency_kinds
from lmconform.context import Hint
from lmconform.registry import COMPARES_LOGITS, register_check

if TYPE_CHECKING:
    from torch import Tensor

    from lmconform.context import Context
    from lmconform.specimen import Specimen

CAUSE = "position.depends_on_length"


@register_check(
    "causality.prefix",
    holds="the logits of a prefix alone equal those of the same tokens at the start of a longer text",
    profile="smoke",
    requires=(*COMPARES_LOGITS, "causality.no_future_leak"),
    space={"time": Span(2, 128), "prefix": Span(1, 127), "mask": Choice("none", "ones")},
    grid=(
        {"time": 66, "prefix": 1, "mask": "none"},
        {"time": 66, "prefix": 9, "mask": "none"},
        {"time": 66, "prefix": 33, "mask": "none"},
        {"time": 66, "prefix": 65, "mask": "none"},
        {"time": 34, "prefix": 1, "mask": "ones"},
        {"time": 34, "prefix": 17, "mask": "ones"},
        {"time": 128, "prefix": 33, "mask": "none"},
        {"time": 128, "prefix": 127, "mask": "none"},
    ),
)
def check_prefix(subject: Specimen, ctx: Context) -> None:
    """Two calls without a cache: a text, and its first tokens alone.

    Exchanging later tokens (causality.no_future_leak) keeps their number, so it cannot see what is computed from the
    length: positions counted from the end, scores or a norm scaled by the number of tokens, frequencies that change
    beyond some length. With a cache such a model decodes wrongly (cache.decode), with a mask its padded rows differ
    (padding.right); without both nothing else shows it.
    """
    stated = _same_frequencies(subject, ctx)
    whole: dict[tuple[int, str], Tensor] = {}
    for case in ctx.cases():
        if case.mask != "none" and not subject.can("mask"):
            continue
        time = min(subject.longest(case.time), stated)
        if time < 2:
            ctx.not_applicable(f"needs 2 tokens; the context is {time}")
        prefix = min(case.prefix, time - 1)
        ids = ctx.ids(1, time)
        if (time, case.mask) not in whole:
            whole[time, case.mask] = _logits(subject, ids, case.mask)
        alone = _logits(subject, ids[:, :prefix], case.mask)
        expected = whole[time, case.mask][:, :prefix]
        moved = ((alone - expected).abs() > tolerance.allowed(subject.noise, expected)).any(-1)[0]
        ctx.equal(
            alone,
            expected,
            "a prefix alone has other logits than the same tokens at the start of a longer text: what is computed "
            "depends on the length",
            where=f"the first {prefix} of {time} tokens, mask {case.mask}",
            hint=_hint(subject, ids, prefix, case.mask, moved) if bool(moved.any()) else "",
        )


def _same_frequencies(subject: Specimen, ctx: Context) -> int:
    """The longest text for which the config states one set of rotary frequencies."""
    kinds, original = frequency_kinds(subject.config)
    if not kinds & BY_LENGTH:
        return sys.maxsize
    if original is None:
        ctx.not_applicable(f"the config states frequencies that change with the length ({', '.join(sorted(kinds))})")
        raise AssertionError("unreachable")
    if original < max(case.time for case in ctx.check.grid):
        ctx.note(f"not tried beyond {original} tokens, where the config states other rotary frequencies")
    return original


def _logits(subject: Specimen, ids: Tensor, mask: str, positions: Tensor | None = None) -> Tensor:
    return subject.logits(ids, mask=None if mask == "none" else ids.new_ones(ids.shape), positions=positions)


def _hint(subject: Specimen, ids: Tensor, prefix: int, mask: str, moved: Tensor) -> str:
    """Where the length comes in: by default positions, by what each token is made of, or by attention."""
    begins = _first_length(subject, ids, prefix, mask)
    from_length = (
        f"; {begins - 1} tokens leave the first {prefix} as they are, {begins} change them: another path is taken "
        "there (a table, a kernel, padding to a multiple, frequencies rescaled beyond a length)"
        if begins > prefix + 1
        else ""
    )
    if subject.can("pos") and not _changed(subject, ids, prefix, mask, counted=True):
        return Hint(
            f"with {subject.convention.positions} 0, 1, 2, ... given the prefix is right, so the positions that "
            f"forward() makes itself depend on the length: counted from the end, or scaled by it{from_length}",
            CAUSE,
        )
    if bool(moved[0]):
        return Hint(
            "the first token changes too, which attends to itself alone: its position is counted from the end or "
            "scaled by the length, or an embedding, a norm or the logits are scaled by the number of tokens (shape[1] "
            f"where shape[-1] is meant){from_length}",
            CAUSE,
        )
    if len(moved) > 1 and not bool(moved[:-1].any()):
        return Hint(
            f"the prefix's last token alone changes: the last position of a text is computed in a way of its own"
            f"{from_length}",
            CAUSE,
        )
    return Hint(
        "the first token does not change, later ones do, so the length comes in where tokens meet: scores scaled by it "
        "(log(n), 1/n, the square root of time for that of the head's width), a bias or rotary angles stretched over "
        f"it, or the capacity of experts{from_length}",
        CAUSE,
    )


def _changed(subject: Specimen, ids: Tensor, prefix: int, mask: str, *, counted: bool = False) -> bool:
    """Whether the logits of the first `prefix` tokens of `ids` are others alone; `counted`: positions are given."""
    import torch

    positions = torch.arange(ids.shape[1], device=ids.device)[None] + subject.first_position if counted else None
    alone = _logits(subject, ids[:, :prefix], mask, None if positions is None else positions[:, :prefix])
    expected = _logits(subject, ids, mask, positions)[:, :prefix]
    return float((alone - expected).abs().max()) > tolerance.allowed(subject.noise, expected)


def _first_length(subject: Specimen, ids: Tensor, prefix: int, mask: str) -> int:
    """The shortest text that changes the logits of its first `prefix` tokens, found by halving."""
    low, high = prefix, ids.shape[1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _changed(subject, ids[:, :middle], prefix, mask) else (middle, high)
    return high
