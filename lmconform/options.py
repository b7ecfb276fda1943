"""The options of a run: one list for the command line, `check_model`, pytest and `[tool.lmconform]`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lmconform.profiles import PROFILES


class OptionError(ValueError):
    """An option is misspelt or has a value that it cannot have (exit code 2)."""


def _option(default: Any, help: str, metavar: str = "", **more: Any) -> Any:
    metadata = {"help": help, "metavar": metavar, **more}
    if isinstance(default, tuple):
        return field(default_factory=tuple, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, eq=False, repr=False)
class Options:
    """How a subject is checked. Field names are the public option names; `import_` stands for `import`."""

    profile: str = _option("default", "how much is run", choices=PROFILES)
    select: tuple[str, ...] = _option((), "only these checks: ids, families or globs", "ID")
    deselect: tuple[str, ...] = _option((), "not these checks: ids, families or globs", "ID")
    device: str = _option("cpu", "where the subject runs: cpu, cuda, cuda:1, mps, or pretended: sim, sim:2", "DEVICE")
    dtype: str | None = _option(None, "convert the subject: float32, float64, bfloat16, float16", "DTYPE")
    reference: Any = _option(None, "a sound model of the same weights to compare with", "SPEC")
    as_loaded: bool = _option(False, "check the weights as they are, not excited ones")
    expected: str | None = _option(None, "expected failures, a TOML file", "FILE")
    known: bool = _option(True, "apply the known deviations of transformers that ship with lmconform")
    seed: int = _option(0, "of weights and tokens", "N")
    time_budget: float | None = _option(None, "start no further check after so many seconds", "SECONDS")
    strict: bool = _option(False, "warnings are findings too")
    isolate: bool = _option(False, "run the subject in a child process")
    json: str | None = _option(None, "write the report as JSON", "FILE")
    html: str | None = _option(None, "write the report as one HTML page", "FILE")
    import_: tuple[str, ...] = _option((), "import this module first", "MODULE")
    trust_remote_code: bool = _option(False, "let a checkpoint bring its own code")
    case: str | None = _option(None, "only this case of the selected check, as a reproduction names it", "CASE")
    timeout: float = _option(120.0, "seconds after which building, or one check, counts as hanging", "SECONDS")

    def __post_init__(self) -> None:
        for name in ("select", "deselect", "import_"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, tuple(filter(None, value.replace(",", " ").split())))
            else:
                object.__setattr__(self, name, tuple(value or ()))
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
    import tomllib  # here, like difflib below: every start of pytest imports this module

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
