"""What a check measured over an axis, as numbers: kept with its Result, in the JSON, and drawn by the HTML report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

DIGITS = 4  # significant ones that are kept: a picture shows no more
LONGEST = 200  # points of a line; longer ones are thinned out to their extremes


@dataclass(frozen=True)
class Curves:
    """Lines over one axis: an error by position, a size by layer, a loss by learning rate.

    `lines` maps what a line shows to a value for each `x`. `bound` is the largest value that was allowed, `marks` are
    vertical lines with their names, `span` is a range of x with its name; `log` names the logarithmic axes ("", "x",
    "y" or "xy"). `case` says on what it was measured. Raises ValueError where a line has another length than `x`.
    """

    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    lines: dict[str, tuple[float, ...]]
    bound: float | None = None
    marks: dict[str, float] = field(default_factory=dict)
    span: tuple[str, float, float] | None = None
    log: str = ""
    case: str = ""

    def __post_init__(self) -> None:
        wrong = [name for name, values in self.lines.items() if len(values) != len(self.x)]
        if wrong or not self.lines or not self.x:
            raise ValueError(f"{self.title!r}: {wrong or 'no line'} with a value for each of {len(self.x)} x")


@dataclass(frozen=True)
class Map:
    """A table `values` [y][x] of sizes that are 0 where nothing was felt: which position depends on which.

    Where `future` holds, only x > y is judged; else every place is. Above `bound` (0 where any value is too much) a
    judged place is a fault. Raises ValueError where rows differ in length.
    """

    title: str
    x_label: str
    y_label: str
    values: tuple[tuple[float, ...], ...]
    bound: float = 0.0
    future: bool = False
    case: str = ""

    def __post_init__(self) -> None:
        if len({len(row) for row in self.values}) != 1 or not self.values[0]:
            raise ValueError(
                f"{self.title!r}: rows of {sorted({len(row) for row in self.values})} values make no table"
            )

    def judged(self, y: int, x: int) -> bool:
        """Whether the bound is meant for that place."""
        return x > y or not self.future


Chart = Curves | Map


def curves(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Sequence[float]],
    *,
    x: Sequence[float] = (),
    **more: Any,
) -> Curves:
    """Curves of plain floats, rounded; `x` counts from 0 if not given.

    Of lines longer than LONGEST, the lowest and the highest point of each stretch are kept, of every line: what stands
    out at one place alone is still seen, at that place. Raises ValueError where lengths differ.
    """
    length = max((len(values) for values in lines.values()), default=0)
    given = x or range(length)
    if wrong := [name for name, values in lines.items() if len(values) != len(given)]:
        raise ValueError(f"{title!r}: {wrong} with a value for each of {len(given)} x")
    kept = thinned([[float(value) for value in values] for values in lines.values()], length)
    shown = {name: rounded(values[place] for place in kept) for name, values in lines.items()}
    return Curves(title, x_label, y_label, rounded(given[place] for place in kept), shown, **more)


def thinned(lines: Sequence[Sequence[float]], length: int) -> list[int]:
    """The places to keep of lines of that length, both ends among them: at most LONGEST, of up to 99 lines."""
    if length <= LONGEST:
        return list(range(length))
    step = math.ceil(length / max(1, (LONGEST - 2) // (2 * len(lines))))
    kept = {0, length - 1}
    for line in lines:
        size = [math.inf if math.isnan(value) else value for value in line].__getitem__
        for start in range(0, length, step):
            stretch = range(start, min(start + step, length))
            kept |= {min(stretch, key=size), max(stretch, key=size)}
    return sorted(kept)


def table(title: str, x_label: str, y_label: str, values: Iterable[Iterable[float]], **more: Any) -> Map:
    """A Map of plain floats, rounded."""
    return Map(title, x_label, y_label, tuple(rounded(row) for row in values), **more)


def rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(f"{float(value):.{DIGITS}g}") for value in values)


def to_dict(chart: Chart) -> dict[str, Any]:
    """The chart as JSON holds it, with its kind."""
    return {"kind": "map" if isinstance(chart, Map) else "curves", **asdict(chart)}


def from_dict(data: Mapping[str, Any]) -> Chart:
    """The chart that `to_dict` wrote. Raises KeyError, TypeError or ValueError for anything else."""
    given = {key: value for key, value in data.items() if key != "kind"}
    if data["kind"] == "map":
        return Map(
            **{**given, "values": tuple(_floats(row) for row in given["values"]), "bound": float(given["bound"])}
        )
    given["x"] = _floats(given["x"])
    given["lines"] = {name: _floats(values) for name, values in given["lines"].items()}
    given["marks"] = {name: float(value) for name, value in given.get("marks", {}).items()}
    if given.get("bound") is not None:
        given["bound"] = float(given["bound"])
    if given.get("span") is not None:
        name, low, high = given["span"]
        given["span"] = (name, float(low), float(high))
    return Curves(**given)


def _floats(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)  # non-finite ones are strings in JSON
