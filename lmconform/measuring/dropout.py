"""A copy of a subject in which train mode leaves nothing to chance."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lmconform import structure

if TYPE_CHECKING:
    from lmconform.specimen import Specimen

DROPOUT = re.compile(r"drop", re.IGNORECASE)
JITTER = re.compile(r"jitter", re.IGNORECASE)


def without_dropout(subject: Specimen, *, lent: bool = False) -> Specimen:
    """A copy with every dropout probability and router jitter 0: in modules, in their attributes, in their configs.

    With `lent` in the memory of the same weights, for whoever changes none. A jitter that decides what eval mode
    computes is no noise (PhiMoE's router_jitter_noise is a threshold): it stays.
    """
    from torch.nn.modules.dropout import _DropoutNd

    quiet = subject.lent() if lent else subject.copy()
    holders: dict[int, Any] = {}
    for part in quiet.module.modules():
        if isinstance(part, _DropoutNd):
            part.p = 0.0
        for holder in (part, getattr(part, "config", None), structure.config_of(part)):
            if holder is not None and hasattr(holder, "__dict__"):
                holders[id(holder)] = holder
    _zero(holders.values(), DROPOUT)
    before = _zero(holders.values(), JITTER)
    if before and not bool((quiet.logits(subject.probe_ids()) == subject.logits(subject.probe_ids())).all()):
        for holder, name, value in before:
            setattr(holder, name, value)
    return quiet


def _zero(holders: Iterable[Any], named: re.Pattern[str]) -> list[tuple[Any, str, float]]:
    """Set such attributes to 0; what they were."""
    before = []
    for holder in holders:
        for name, value in list(vars(holder).items()):
            if named.search(name) and isinstance(value, float) and value > 0:
                with contextlib.suppress(AttributeError):  # a frozen config keeps its value; its modules were set
                    setattr(holder, name, 0.0)
                    before.append((holder, name, value))
    return before
