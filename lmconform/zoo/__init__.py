"""`lmconform zoo`: the suite over every causal architecture of transformers, one row a type.

Importing this imports neither torch nor transformers; the server process (lmconform.zoo.server) does.
"""

from __future__ import annotations

from lmconform.zoo.command import add_arguments, main

__all__ = ["add_arguments", "main"]
