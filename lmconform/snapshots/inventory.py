"""What a model is made of, by name: parameters, buffers, ties, config. Nothing here runs it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform import structure
from lmconform.snapshots.drawing import parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

_PASSING = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "_commit_hash")


@dataclass
class Inventory:
    """Names to "float32 [67, 48]"; `tied` are groups of names that share one tensor."""

    parameters: dict[str, str]
    buffers: dict[str, str]
    tied: list[list[str]]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, module: nn.Module) -> Inventory:
        known = parameters(module)
        saved = set(module.state_dict())
        return cls(
            {name: _described(tensor) for names, tensor in known.items() for name in names},
            {
                name: _described(buffer) + ("" if name in saved else ", not saved")
                for name, buffer in module.named_buffers(remove_duplicate=False)
            },
            [sorted(names) for names in known if len(names) > 1],
        )


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def config_of(module: nn.Module) -> dict[str, Any]:
    """The config as plain data, without what changes from release to release; empty where there is none."""
    config: Any = structure.config_of(module)
    if config is None:
        return {}
    to_dict = getattr(config, "to_dict", None)
    if callable(to_dict):
        data = to_dict()
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        data = dataclasses.asdict(config)
    else:
        data = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    return {str(k): _plain(v) for k, v in sorted(data.items(), key=lambda item: str(item[0])) if k not in _PASSING}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value if value == value else "nan"
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if key not in _PASSING}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    return type(value).__name__  # its repr may hold an address


def hash_of(config: dict[str, Any]) -> str:
    """The first 16 digits of the SHA-256 of the config's canonical JSON."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
