"""Which line of the model's own code calls torch."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

from lmconform.measuring.multihead import call_through

_PASSED_ON = call_through.__code__.co_filename


def own_frame(mode: str) -> FrameType | None:
    """The innermost frame of the model's own code; None where that is not known. `mode`: the file of who asks."""
    from lmconform.runner import PACKAGE
    from lmconform.simulated.tracking import is_library

    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (
        is_library(frame.f_code)
        or frame.f_code.co_filename in (mode, _PASSED_ON)
        or frame.f_code.co_name == "__torch_function__"  # of a mode that was entered later
    ):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(PACKAGE):  # the model has no line of its own in it
        return None
    return frame


def called(func: Any, frame: FrameType | None) -> str:
    """Tensor.mean (model.py:9)."""
    from lmconform.simulated.tracking import call_name

    name = call_name(func)
    return name if frame is None else f"{name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
