"""Keeping Python's cyclic garbage collector away from what torch and transformers leave to the end of the process."""

from __future__ import annotations

import gc
import importlib
import sys


def import_frameworks(spec: str) -> None:
    """Import what the subject of that SPEC will import anyway, and have no later collection walk it (`gc.freeze`).

    That is torch, and transformers for a SPEC of its own. They leave half a million objects, and to walk these again
    and again is a tenth of a default run. While they are imported nothing is collected; building is left alone, for a
    builder may make garbage of its own. For processes that are there for their subjects: what else is alive now is
    kept as well. What cannot be imported is for the build to say.
    """
    wanted = ["torch"]
    if spec.startswith("transformers:") or ":" not in spec:
        wanted.append("transformers.modeling_utils")
    if all(name in sys.modules for name in wanted):
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        for name in wanted:
            importlib.import_module(name)
        gc.freeze()  # the 3 MB of garbage among it are not worth a collection of 0.25 s
    except Exception:
        return
    finally:
        if enabled:
            gc.enable()
