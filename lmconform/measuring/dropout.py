"""A copy of a subject in which train mode leaves nothing to chance."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

from lmconform import structure

if TYPE_CHECKING:
    from lmconform.specimen import Specimen

NAMED = re.compile(r"drop|jitter", re.IGNORECASE)


def without_dropout(subject: Specimen) -> Specimen:
    """A copy with every dropout probability and router jitter 0: in modules, in their attributes, in their configs."""
    from torch.nn.modules.dropout import _DropoutNd

    quiet = subject.copy()
    holders: dict[int, Any] = {}
    for part in quiet.module.modules():
        if isinstance(part, _DropoutNd):
            part.p = 0.0
        for holder in (part, getattr(part, "config", None), structure.config_of(part)):
            if holder is not None and hasattr(holder, "__dict__"):
                holders[id(holder)] = holder
    for holder in holders.values():
        for name, value in list(vars(holder).items()):
            if NAMED.search(name) and isinstance(value, float) and value > 0:
                with contextlib.suppress(AttributeError):  # a frozen config keeps its value; its modules were set
                    setattr(holder, name, 0.0)
    return quiet
