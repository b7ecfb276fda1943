"""The six methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from models.positional.alibi import Alibi
from models.positional.diet import Diet
from models.positional.encoding import PositionEncoding
from models.positional.math_adaptive import MathAdaptive
from models.positional.rope import Rope
from models.positional.sinusoidal import Sinusoidal
from models.positional.t5_relative import T5Relative

METHODS_BY_NAME: dict[str, Any] = {
    "rope": Rope,
    "sinusoidal": Sinusoidal,
    "t5_relative": T5Relative,
    "diet": Diet,
    "alibi": Alibi,
    "math_adaptive": MathAdaptive,
}
METHODS = tuple(METHODS_BY_NAME)


def check_method(method: str) -> str:
    """The name itself. Raises ValueError for an unknown one."""
    if method not in METHODS_BY_NAME:
        raise ValueError(f"pe_method {method!r} is none of {', '.join(METHODS)}")
    return method


def complete_options(method: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """The method's options with defaults filled in. Raises ValueError for an unknown method or option."""
    defaults = METHODS_BY_NAME[check_method(method)].OPTIONS
    if unknown := set(options or {}) - set(defaults):
        known = ", ".join(defaults) or "none"
        raise ValueError(f"{method} has no option {', '.join(sorted(unknown))} (its options: {known})")
    return {**defaults, **(options or {})}


def make_encoding(config: PreTrainedConfig) -> PositionEncoding:
    """The encoding that `config.pe_method` names."""
    make: Callable[[PreTrainedConfig], PositionEncoding] = METHODS_BY_NAME[check_method(config.pe_method)]
    return make(config)
