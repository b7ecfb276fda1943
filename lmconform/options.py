"""The options of a run, typed and checked, for the command line, `check_model`, pytest and `[tool.lmconform]`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lmconform.flags import PROFILES


class OptionError(ValueError):
    """An option is misspelt or has a value that it cannot have (exit code 2)."""


@dataclass(frozen=True, eq=False, repr=False)
class Options:
    """How a subject is checked. Field names are the public option names; `import_` stands for `import`.

    What each is for is said once, in `lmconform.flags`.
    """

    profile: str = "default"
    select: tuple[str, ...] = ()
    deselect: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str | None = None
    reference: Any = None
    as_loaded: bool = False
    expected: str | None = None
    known: bool = True
    seed: int = 0
    time_budget: float | None = None
    strict: bool = False
    isolate: bool = False
    json: str | None = None
    html: str | None = None
    import_: tuple[str, ...] = ()
    trust_remote_code: bool = False
    case: str | None = None
    timeout: float = 120.0

    def __post_init__(self) -> None:
        for name in ("select", "deselect", "import_"):
            value = getattr(self, name)
            given = [value] if isinstance(value, str) else value or ()
            object.__setattr__(self, name, tuple(each for item in given for each in item.replace(",", " ").split()))
        if self.profile not in PROFILES:
            raise OptionError(f"profile {self.profile!r} is none of {', '.join(PROFILES)}")
        if self.time_budget is not None and not self.time_budget > 0:
            raise OptionError(f"time_budget must be above 0 seconds, not {self.time_budget}")
        if not self.timeout > 0:
            raise OptionError(f"timeout must be above 0 seconds, not {self.timeout}")


NAMES = {("import" if f.name == "import_" else f.name): f for f in fields(Options)}


def make_options(given: Mapping[str, Any]) -> Options:
    """Options from keywords. Raises OptionError that suggests the nearest name."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        name = "import" if name == "import_" else name
        if name not in NAMES:
            raise OptionError(f"no option is called {key!r}{_suggest(name, NAMES)}")
        values[NAMES[name].name] = value
    return Options(**values)


def read_ini(folder: Path) -> dict[str, Any]:
    """`[tool.lmconform]` of the pyproject.toml in `folder`; empty where there is none. Raises OptionError."""
    file = folder / "pyproject.toml"
    if not file.is_file():
        return {}
    import tomllib

    try:
        tools = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{file}: {error}") from error
    table = tools.get("lmconform", {}) if isinstance(tools, dict) else {}
    if not isinstance(table, dict):
        raise OptionError(f"{file}: tool.lmconform = {table!r} is no table; options stand under [tool.lmconform]")
    kinds: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in NAMES:
            raise OptionError(f"{file}: [tool.lmconform] has no option {key!r}{_suggest(name, NAMES)}")
        annotation = str(NAMES[name].type)
        kind = next((k for prefix, k in kinds.items() if annotation.startswith(prefix)), None)
        wrong = kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind))
        if annotation.startswith("tuple") and not isinstance(value, str):
            wrong = not isinstance(value, list) or not all(isinstance(item, str) for item in value)
            annotation = "string or list of strings"
        if wrong:
            raise OptionError(f"{file}: [tool.lmconform] {key} = {value!r} is no {annotation.removesuffix(' | None')}")
        if name == "expected":
            table[key] = str(folder / value)
    return {key.replace("-", "_"): value for key, value in table.items()}


def require_writable(*files: str | None) -> None:
    """Raises OptionError, before any work is done, for a file to be written that is a folder or stands in none."""
    for file in filter(None, files):
        folder = Path(file).parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise OptionError(f"{file}: {folder} is no folder that can be written to")
        if Path(file).is_dir():
            raise OptionError(f"{file} is a folder; name a file")


def _suggest(name: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
