"""How models of other libraries are called where their forward() alone does not say it: caches, losses, switches.

An adapter is a module with a `call(model, input_ids, **inputs)`, as a Subject takes it. It is found by the model's
class and tried before the guesses of lmconform.conventions, so that nobody has to name it. None imports its library
before a model of it is there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

SHIPPED = {
    "litgpt.model.GPT": "litgpt",
    "transformer_lens.HookedTransformer.HookedTransformer": "hooked_transformer",
    "transformer_lens.model_bridge.transformer_bridge.TransformerBridge": "transformer_bridge",
    "x_transformers.x_transformers.TransformerWrapper": "x_transformers",
}


def shipped_for(module: nn.Module) -> Callable[..., Any] | None:
    """The shipped call() for a model of that class, or of one derived from it; None where there is none."""
    for kind in type(module).__mro__:
        name = SHIPPED.get(f"{kind.__module__}.{kind.__qualname__}")
        if name is not None:
            call: Callable[..., Any] = importlib.import_module(f"{__name__}.{name}").call
            return call
    return None
