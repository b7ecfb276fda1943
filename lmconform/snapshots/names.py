"""Which file of a folder is whose snapshot."""

from __future__ import annotations

import re

SUFFIX = ".lmsnap.json"


def file_name(spec: str) -> str:
    """The file of a subject in a folder of snapshots: its SPEC with what no file name holds replaced by "-"."""
    return (re.sub(r"[^\w.-]+", "-", spec).strip("-.") or "subject") + SUFFIX
