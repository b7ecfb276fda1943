"""The space of cases a check is tried on: a fixed grid first, the whole space when hypothesis searches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Span:
    """Whole numbers from low to high, both included; smaller is simpler."""

    low: int
    high: int

    def parse(self, text: str) -> int:
        value = int(text)
        if not self.low <= value <= self.high:
            raise ValueError(f"{value} is outside {self.low}..{self.high}")
        return value


@dataclass(frozen=True)
class Choice:
    """One of a few values; the first is the simplest."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)

    def parse(self, text: str) -> Any:
        for value in self.values:
            if str(value) == text:
                return value
        raise ValueError(f"{text!r} is none of {', '.join(map(str, self.values))}")


Space = Mapping[str, Span | Choice]


class Case(dict[str, Any]):
    """One point of a check's space: `case["time"]` or `case.time`; prints as `time=3,pad=1`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this case has no {name}; it has {', '.join(self) or 'nothing'}") from None

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.items())


def parse_case(text: str, space: Space) -> Case:
    """Read `time=3,pad=1` back. Raises ValueError that names the field, and what the space allows."""
    case = Case()
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        key = key.strip()
        if key not in space:
            raise ValueError(f"case field {key!r} is unknown; this check has {', '.join(space) or 'no fields'}")
        try:
            case[key] = space[key].parse(value.strip())
        except ValueError as error:
            raise ValueError(f"case field {key}: {error}") from None
    missing = [key for key in space if key not in case]
    if missing:
        raise ValueError(f"case lacks {', '.join(missing)}")
    return case
