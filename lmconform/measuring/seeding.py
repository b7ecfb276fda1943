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
    """Within it the first torch.manual_seed() of the builder's own code does nothing; gives the place, file:line.

    A call out of a module's method, or a function that was given the module, is the model's: it seeds as ever. So does
    a second call, which may start each block anew.
    """
    import torch

    places: list[str] = []
    original = torch.manual_seed

    def manual_seed(seed: Any) -> torch.Generator:
        caller = sys._getframe(1)
        of_builder = caller.f_code is not Subject._build.__code__ and _frame_of_builder(caller)
        if of_builder and not places:
            places.append(f"{Path(of_builder.f_code.co_filename).name}:{of_builder.f_lineno}")
            return torch.default_generator
        return original(seed)

    torch.manual_seed = torch.random.manual_seed = manual_seed
    try:
        yield places
    finally:
        torch.manual_seed = torch.random.manual_seed = original


def _frame_of_builder(frame: FrameType | None) -> FrameType | None:
    """The frame of the builder itself, where nothing between it and `frame` is the model's own; else None."""
    import torch

    while frame is not None:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, torch.nn.Module) or (isinstance(first, type) and issubclass(first, torch.nn.Module)):
            return None
        if frame.f_back is not None and frame.f_back.f_code is Subject._build.__code__:
            return frame
        frame = frame.f_back
    return None
