"""Charts of a Result as SVG for an HTML page: colours are the page's CSS variables, text stays text."""

from __future__ import annotations

import io
import itertools
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from lmconform.charts import Chart, Curves, Map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

WIDTH, HEIGHT = 4.4, 2.0  # inches of the axes with their labels; 72 units of the SVG each
SQUARE = 4.0
LEFT, BOTTOM, RIGHT = 0.85, 0.5, 0.1  # inches kept free for labels: laying them out each time takes longer than drawing
ROW = 0.22  # inches that a row of the legend takes
# matplotlib wants colours, the page has variables: each of these stands for one, and is exchanged in the SVG
STANDS_FOR = {
    "#010203": "var(--ink)", "#010204": "var(--soft)", "#010205": "var(--line)", "#010206": "var(--bad)",
    "#010207": "var(--good)", "#010208": "var(--series-1)", "#010209": "var(--series-2)", "#01020a": "var(--series-3)",
    "#01020b": "var(--series-4)",
}  # fmt: skip
INK, SOFT, LINE, BAD, GOOD, *SERIES = STANDS_FOR
STYLES = ("-", "--", "-.", ":")  # colour alone must not tell lines apart
FELT, FAULT = (0x2F, 0x6F, 0xB5), (0xD1, 0x3B, 0x2E)  # of a map's cells; readable on light and dark
SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"
SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "lmconform", "font.size": 11, "text.color": INK, "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 10, "legend.handlelength": 2.4,
    "axes.formatter.useoffset": False, "text.parse_math": False,
}  # fmt: skip
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # a name may hold anything


class Artist:
    """Draws the charts of one page; ids inside the SVGs are distinct over the page."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def svg(self, chart: Chart) -> str:
        """The chart as an <svg> element without title; `described` says in words what it shows."""
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        with rc_context(SETTINGS), io.StringIO() as file:
            figure = Figure()
            FigureCanvasSVG(figure)
            axes = figure.add_axes((0, 0, 1, 1))
            if isinstance(chart, Map):
                _draw_map(axes, chart)
                _arrange(figure, axes, SQUARE, SQUARE)
            else:
                _draw_curves(axes, chart)
                _arrange(figure, axes, WIDTH, HEIGHT)
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
            return _for_page(file.getvalue(), f"c{next(self._numbers)}-", _text(described(chart)))


# -- drawing -----------------------------------------------------------------------------------------------------------


def _arrange(figure: Figure, axes: Axes, width: float, height: float) -> None:
    """Put the axes on a figure of that size, and above them the legend, where a name says more than the title does."""
    handles, labels = axes.get_legend_handles_labels()
    rows = math.ceil(len(labels) / 2) if len(labels) > 1 or axes.images else 0
    whole = height + (rows + 0.5) * ROW
    figure.set_size_inches(width, whole)
    axes.yaxis.set_label_coords(-(LEFT - 0.2) / (width - LEFT - RIGHT), 0.5)
    axes.set_position((LEFT / width, BOTTOM / whole, 1 - (LEFT + RIGHT) / width, (height - BOTTOM) / whole))
    if rows:
        figure.legend(handles, labels, loc="upper left", ncols=2, borderaxespad=0)


def _draw_curves(axes: Axes, chart: Curves) -> None:
    from matplotlib.ticker import MaxNLocator

    values = [value for line in chart.lines.values() for value in line if math.isfinite(value)]
    bound = chart.bound if chart.bound is not None and math.isfinite(chart.bound) else None
    floor = _floor(values, bound) if "y" in chart.log else 0.0
    marker = "o" if len(chart.x) <= 40 else ""
    for number, (name, line) in enumerate(chart.lines.items()):
        shown = [max(value, floor) if math.isfinite(value) else math.nan for value in line]
        axes.plot(
            chart.x, shown, label=_text(name), color=SERIES[number % len(SERIES)],
            linestyle=STYLES[number % len(STYLES)], marker=marker, markersize=3, linewidth=1.5,
        )  # fmt: skip
    if bound is not None:
        axes.axhline(bound, color=BAD, linewidth=1.2, linestyle=(0, (5, 3)), label="allowed at most")
    if chart.span is not None and all(map(math.isfinite, chart.span[1:])):
        name, low, high = chart.span
        axes.axvspan(low, high, color=GOOD, alpha=0.16, linewidth=0, label=_text(name))
    for number, (name, value) in enumerate(chart.marks.items()):
        if not math.isfinite(value):
            continue
        axes.axvline(value, color=INK, linewidth=1.2, linestyle=STYLES[(number + 1) % len(STYLES)], label=_text(name))
    axes.set(xlabel=_text(chart.x_label), ylabel=_text(chart.y_label))
    if "x" in chart.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(_short)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if "y" in chart.log:
        axes.set_yscale("log")
        zero = any(value == 0 for value in values)
        axes.yaxis.set_major_formatter(lambda value, _: "0" if zero and value <= floor else _short(value))
        axes.minorticks_off()
        top = max([*values, bound or 0.0, floor])
        axes.set_ylim(floor / 1.5, max(1.5 * top, 15 * floor))  # two ticks at least
    else:
        low, high = min([0.0, *values]), max([0.0, *values])
        axes.set_ylim(low, high + 0.05 * ((high - low) or 1.0))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(_short)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)


def _text(given: str) -> str:
    """A name as a subject gave it, without what no SVG can hold."""
    return NOT_IN_XML.sub("", given)


def _floor(values: Sequence[float], bound: float | None) -> float:
    """The decade at which a logarithmic axis begins; where there are zeros, they lie there, one below the rest."""
    lowest = min((value for value in (*values, bound or 0.0) if value > 0), default=1.0)
    return 10.0 ** (math.floor(math.log10(lowest)) - (0.0 in values))


def _short(value: float, _: Any = None) -> str:
    """A tick's number in few characters: 0.25, 1e-5."""
    if value == 0 or 0.01 <= abs(value) < 1e5:
        return f"{value:g}"
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"


def _draw_map(axes: Axes, chart: Map) -> None:
    from matplotlib.ticker import MaxNLocator

    cells = _cells(chart)
    axes.imshow(cells, interpolation="none", aspect="equal" if _square(chart) else "auto")
    axes.set(xlabel=_text(chart.x_label), ylabel=_text(chart.y_label))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    size = min(cells.shape[:2]) - 0.5
    if chart.future:
        axes.plot([-0.5, size], [-0.5, size], color=SOFT, linewidth=0.8)
    names = {FELT: "felt, as it may be", FAULT: "felt, and must not be"} if chart.future else {FAULT: "over the bound"}
    for colour, name in names.items():
        axes.plot([], [], "s", color=_hex(colour), label=name)


def _square(chart: Map) -> bool:
    return len(chart.values) == len(chart.values[0])


def _cells(chart: Map) -> NDArray[Any]:
    """RGBA [y, x, 4], from 0 to 1: the colour says whether a place is at fault, the strength how large (logarithm)."""
    import numpy as np

    values = np.array(chart.values, dtype=float)
    finite = np.isfinite(values)
    judged = np.array([[chart.judged(y, x) for x in range(values.shape[1])] for y in range(values.shape[0])])
    fault = judged & ~(values <= chart.bound)  # nan as well
    shown = fault if not chart.future else ~finite | (values > 0)
    cells = np.zeros((*values.shape, 4))
    share = np.ones_like(values)  # what is not finite is felt as strongly as anything
    sized = shown & finite & (values > 0)
    if sized.any():
        size = np.log10(values, where=sized, out=np.zeros_like(values))
        low, high = size[sized].min(), size[sized].max()
        if high > low:
            share = np.where(sized, (size - low) / (high - low), 1.0)
    cells[..., 3] = np.where(shown, 0.35 + 0.65 * share, 0.0)
    cells[..., :3] = np.where(fault[..., None], FAULT, FELT) / np.array(255.0)
    return cells


def _hex(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


# -- in words ----------------------------------------------------------------------------------------------------------


def described(chart: Chart) -> str:
    """What the chart shows, for those who cannot see it."""
    if isinstance(chart, Map):
        return f"{chart.title}: {_map_in_words(chart)}."
    parts = [f"{name} from {_span(values)}" for name, values in chart.lines.items()]
    if chart.bound is not None:
        parts.append(f"allowed at most {chart.bound:.3g}")
    if chart.span is not None:
        parts.append("{} {:.3g} to {:.3g}".format(*chart.span))
    parts += [f"{name} {value:.3g}" for name, value in chart.marks.items()]
    return f"{chart.title}, {chart.y_label} over {chart.x_label}: {'; '.join(parts)}."


def _span(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "no finite value"
    text = f"{finite[0]:.3g} to {finite[-1]:.3g}"
    extremes = min(finite), max(finite)
    if extremes == tuple(sorted((finite[0], finite[-1]))):
        return text
    return "{} (lowest {:.3g}, highest {:.3g})".format(text, *extremes)


def _map_in_words(chart: Map) -> str:
    judged = [(value, y, x) for y, x, value in _places(chart) if chart.judged(y, x)]
    wrong = [place for place in judged if not place[0] <= chart.bound]
    if not wrong:
        return f"none of {len(judged)} places is more than {chart.bound:.3g}"
    value, y, x = max(wrong, key=lambda place: math.inf if math.isnan(place[0]) else place[0])
    return (
        f"{len(wrong)} of {len(judged)} places are more than the {chart.bound:.3g} that is allowed, the largest "
        f"{value:.3g} at {chart.y_label} {y}, {chart.x_label} {x}"
    )


def _places(chart: Map) -> Iterator[tuple[int, int, float]]:
    for y, row in enumerate(chart.values):
        for x, value in enumerate(row):
            yield y, x, value


# -- from matplotlib's file to a part of the page ----------------------------------------------------------------------


def _for_page(text: str, prefix: str, label: str) -> str:
    """The <svg> element alone: sized by its view box, named for screen readers, in the page's colours and font."""
    root = ET.fromstring(text)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-label", label)
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}style", f"{{{SVG}}}metadata"):
                parent.remove(child)
    used = {value.strip("url()#") for node in root.iter() for value in node.attrib.values() if "#" in value}
    for node in root.iter():
        node.tail = None
        if node.tag not in (f"{{{SVG}}}text", f"{{{SVG}}}tspan"):
            node.text = None
        for name, value in list(node.attrib.items()):
            if name == "id" and value not in used:
                del node.attrib[name]
            elif name == "id":
                node.set(name, prefix + value)
            elif name == XLINK:
                del node.attrib[name]
                node.set("href", value.replace("#", f"#{prefix}", 1) if value.startswith("#") else value)
            elif name == "clip-path":
                node.set(name, value.replace("#", f"#{prefix}", 1))
            elif name == "style":
                node.set(name, _styled(value))
            elif name == "d":
                node.set(name, " ".join(value.split()))
    _register()
    return ET.tostring(root, encoding="unicode").replace(f' xmlns="{SVG}"', "")


def _styled(style: str) -> str:
    kept = [part for part in style.split("; ") if not part.startswith("font-family")]
    return "; ".join(_coloured(part) for part in kept)


def _coloured(part: str) -> str:
    for colour, variable in STANDS_FOR.items():
        part = part.replace(colour, variable)
    return part


@cache
def _register() -> None:
    """ElementTree writes SVG's elements without a prefix."""
    ET.register_namespace("", SVG)
