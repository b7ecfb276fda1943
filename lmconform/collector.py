"""Keeping Python's cyclic garbage collector away from what lives to the end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keeping() -> Iterator[None]:
    """Within, nothing is collected; at the end once, and what is alive then no later collection walks (`gc.freeze`).

    For the build of a subject, in a process that is there for its checks: torch and transformers leave a million
    objects, and to walk them again and again is a tenth of a default run.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        if enabled:
            gc.enable()
