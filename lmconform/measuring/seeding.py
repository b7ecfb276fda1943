"""A seed that the builder itself sets, for the same weights each time: not the model's, and left out on request."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lmconform.subject import Subject


@contextmanager
def builders_seed_left_out() -> Iterator[list[str]]:
    """Within it torch.manual_seed() does nothing where the builder's own code calls it; gives the places, file:line.

    A call out of a module's method, or a function that was given the module, is the model's: it seeds as ever.
    """
    import torch

    places: list[str] = []
    original = torch.manual_seed

    def manual_seed(seed: Any) -> torch.Generator:
        caller = sys._getframe(1)
        if caller.f_code is not Subject._build.__code__ and _is_the_builders(caller):
            places.append(f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}")
            return torch.default_generator
        return original(seed)

    torch.manual_seed = torch.random.manual_seed = manual_seed
    try:
        yield places
    finally:
        torch.manual_seed = torch.random.manual_seed = original


def _is_the_builders(frame: FrameType | None) -> bool:
    import torch

    while frame is not None:
        code = frame.f_code
        if code is Subject._build.__code__:
            return True
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
        if isinstance(first, torch.nn.Module) or (isinstance(first, type) and issubclass(first, torch.nn.Module)):
            return False
        frame = frame.f_back
    return False
