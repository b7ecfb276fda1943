"""lmconform: the conformance and regression suite for causal language models.

Importing this imports neither torch nor transformers; they are loaded when a check runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
SPEC_VERSION = 1

if TYPE_CHECKING:
    from lmconform.api import check_model
    from lmconform.cases import Choice, Span
    from lmconform.context import Context, Hint, Violation
    from lmconform.pytest_run import parametrize_with_checks
    from lmconform.recipe import Recipe
    from lmconform.registry import register_check
    from lmconform.results import Cause, Report, Result, Status
    from lmconform.simulated import PlacementError, simulated_accelerator
    from lmconform.specimen import Unavailable
    from lmconform.subject import BuildError, Subject

_HOMES = {
    "check_model": "api",
    "parametrize_with_checks": "pytest_run",
    "register_check": "registry",
    "Subject": "subject",
    "Recipe": "recipe",
    "Hint": "context",
    "BuildError": "subject",
    "Report": "results",
    "Result": "results",
    "Cause": "results",
    "Status": "results",
    "Violation": "context",
    "Context": "context",
    "Unavailable": "specimen",
    "Span": "cases",
    "Choice": "cases",
    "simulated_accelerator": "simulated",
    "PlacementError": "simulated",
}

__all__ = [
    "SPEC_VERSION", "BuildError", "Cause", "Choice", "Context", "Hint", "PlacementError", "Recipe", "Report", "Result",
    "Span", "Status", "Subject", "Unavailable", "Violation", "__version__", "check_model",
    "parametrize_with_checks", "register_check", "simulated_accelerator",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lmconform.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lmconform' has no attribute {name!r}")
