"""Figures as SVG, drawn from a few primitives: axes, lines, points, bars, heat maps.

A figure is readable without scripts, has a title and a description, and takes its colors from the page, light or dark.
Series differ in color, in the marks of their points and in their dashes, so that color alone says nothing.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape, quoteattr

WIDTH, HEIGHT = 380, 270
CHARACTER, LINE = 6.6, 16  # pixels of a character and of a line of text
# After Okabe and Ito, made darker for a light page and lighter for a dark one: each has a contrast of 3 or more.
LIGHT = ("#1c1d20", "#0072b2", "#d55e00", "#00805e", "#b14a84", "#8f6400", "#2b86b9")
DARK = ("#e8e9eb", "#56b4e9", "#ff8a3d", "#2ccb9b", "#e59ac4", "#f0c03c", "#9fd6f7")
SURFACES = {"light": ("#ffffff", "#d9d9d4", "#5c5f66"), "dark": ("#1d2024", "#363b42", "#a3a8b0")}
MARKS = ("circle", "square", "triangle", "diamond", "cross", "nabla")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "1 2")


def style() -> str:
    """Return the style of figures; a page that has its own surface colors needs only this."""
    classes = "".join(f".c{i}{{color:var(--c{i})}}" for i in range(len(LIGHT)))
    rules = (
        ".figure{display:block;width:100%;height:auto}"
        ".figure text{font:12px system-ui,sans-serif;fill:var(--c0)}.figure text.quiet{fill:var(--quiet)}"
        ".figure .grid{stroke:var(--line);stroke-width:1}.figure .axis{stroke:var(--quiet);stroke-width:1}"
        ".figure .line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}"
        ".figure .mark{fill:currentColor;stroke:var(--card);stroke-width:1}"
    )
    light, dark = (
        f":root{{{_variables(scheme, colors)}}}" for scheme, colors in (("light", LIGHT), ("dark", DARK))
    )
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}{rules}{classes}"


def _variables(scheme: str, colors: Sequence[str]) -> str:
    card, line, quiet = SURFACES[scheme]
    series = "".join(f"--c{i}:{color};" for i, color in enumerate(colors))
    return f"--card:{card};--line:{line};--quiet:{quiet};{series}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure, and the same numbers as a table.

    Attributes:
        key: its name as a file, such as "cost-parameters".
        title: one line.
        description: what it shows, for those who do not see it.
        body: SVG elements.
        height: of the view box, which is WIDTH wide.
        header, rows: the numbers.
    """

    key: str
    title: str
    description: str
    body: str
    height: float
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def svg(self, alone: bool = False) -> str:
        """Return the figure as an SVG element, or as a file of its own with its style."""
        own = f"<style>{escape(style())}</style>" if alone else ""
        name = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
        size = f' width="{WIDTH}" height="{self.height:g}"' if alone else ""
        surface = f'<rect width="{WIDTH}" height="{self.height:g}" fill="var(--card)"/>' if alone else ""
        ids = f"{self.key}-title", f"{self.key}-text"
        box = f'viewBox="0 0 {WIDTH} {self.height:g}"{size}'
        return (
            f'<svg{name} class="figure" id={quoteattr(self.key)} {box} role="img" '
            f'aria-labelledby="{ids[0]} {ids[1]}"><title id="{ids[0]}">{escape(self.title)}</title>'
            f'<desc id="{ids[1]}">{escape(self.description)}</desc>{own}{surface}{self.body}</svg>'
        )


@dataclasses.dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: for the legend.
        points: (x, y).
        number: from 1; it chooses color, mark and dashes. 0 has the color of text.
        spread: half the length of the error bar of each point; none if empty.
        labels: a short text beside each point; none if empty.
        joined: whether a line joins the points.
        shift: how far the points are drawn to the right of their places, in pixels, so that error bars of several
            series are beside each other.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    number: int
    spread: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    joined: bool = True
    shift: float = 0.0


@dataclasses.dataclass(frozen=True)
class Axis:
    """The range of an axis, and its ticks.

    Attributes:
        low, high: ends; low < high.
        ticks: values within, in order.
        log: whether distances are of logarithms.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Return the place of a value: 0 at the low end, 1 at the high end."""
        own = [math.log10(v) if self.log else v for v in (value, self.low, self.high)]
        return (own[0] - own[1]) / (own[2] - own[1])


def linear_axis(values: Iterable[float], count: int = 5) -> Axis:
    """Return an axis whose ticks are multiples of 1, 2 or 5 times a power of ten, and whose ends are ticks.

    Args:
        values: finite; all are within the axis.
        count: about so many steps.
    """
    each = list(values) or [0.0, 1.0]
    low, high = min(each), max(each)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(values: Iterable[float]) -> Axis:
    """Return a logarithmic axis whose ticks are 1, 2 and 5 times powers of ten, or the powers alone.

    Args:
        values: above 0; all are within the axis.
    """
    each = list(values)
    low, high = math.log10(min(each)), math.log10(max(each))
    decades = range(math.floor(low) - 1, math.ceil(high) + 2)
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    candidates = sorted(float(f"{m}e{d}") for d in decades for m in factors)
    first = max(i for i, tick in enumerate(candidates) if tick <= min(each) * (1 + 1e-9))
    last = min(i for i, tick in enumerate(candidates) if tick >= max(each) * (1 - 1e-9))
    ticks = candidates[first : max(last, first + 1) + 1]
    return Axis(ticks[0], ticks[-1], tuple(ticks), log=True)


def short(value: float) -> str:
    """Return a number for a tick or a cell: "0.05", "98.5", "12k", "1.2M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"


def _fitting(text: str, room: float) -> str:
    """Return a text, cut to the room that it has in pixels."""
    most = max(1, int(room / CHARACTER))
    return text if len(text) <= most else f"{text[: most - 1]}…"


class Canvas:
    """Collects SVG elements."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", kind: str = "", more: str = ""
    ) -> None:
        """Write a text; `y` is its base line."""
        own = f' class="{kind}"' if kind else ""
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}"{where}{own}{more}>{escape(text)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "grid", more: str = "") -> None:
        """Draw a straight line."""
        self.parts.append(
            f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{more}/>'
        )

    def path(self, points: Sequence[tuple[float, float]], number: int, dash: str = "") -> None:
        """Join points by a line in the color of a series."""
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline class="line c{color_of(number)}" points="{places}"{dashes}/>')

    def rect(
        self, x: float, y: float, width: float, height: float, color: int, opacity: float = 1.0
    ) -> None:
        """Fill a rectangle."""
        shade = "" if opacity == 1 else f' fill-opacity="{opacity:.2f}"'
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="var(--c{color})"{shade}/>'
        )

    def mark(self, x: float, y: float, number: int) -> None:
        """Draw the mark of a series."""
        color, kind, r = color_of(number), MARKS[_turn(number) % len(MARKS)], 4.5  # half the width
        if kind == "circle":
            self.parts.append(f'<circle class="mark c{color}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>')
            return
        shapes: dict[str, list[tuple[float, float]]] = {
            "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
            "triangle": [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
            "nabla": [(0, 1.2), (1.1, -0.9), (-1.1, -0.9)],
            "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
            "cross": [
                *((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)),
                *((0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
            ],
        }
        corners = shapes[kind]
        places = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners)
        self.parts.append(f'<polygon class="mark c{color}" points="{places}"/>')

    def __str__(self) -> str:
        return "".join(self.parts)


def color_of(number: int) -> int:
    """Return the color of the series with a number: 0 for 0; those from 1 come again after the last."""
    return 1 + (number - 1) % (len(LIGHT) - 1) if number else 0


def _turn(number: int) -> int:
    """Return the place of a series in marks and dashes: when a color comes again, it is with others."""
    return number + max(0, number - 1) // (len(LIGHT) - 1)


@dataclasses.dataclass
class Plane:
    """Two axes on a canvas, and where values are on it."""

    canvas: Canvas
    x: Axis
    y: Axis
    left: float
    top: float
    right: float
    bottom: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixels of a point."""
        across = self.left + self.x.share(x) * (self.right - self.left)
        return across, self.bottom - self.y.share(y) * (self.bottom - self.top)


def plane(
    canvas: Canvas, x: Axis, y: Axis, labels: tuple[str, str], top: float, height: float = HEIGHT
) -> Plane:
    """Draw axes with ticks, grid and names; the room above `top` is left for a legend."""
    widest = max(len(short(tick)) for tick in y.ticks)
    left, right, bottom = 12 + widest * CHARACTER, WIDTH - 18, height - 42
    own = Plane(canvas, x, y, left, top + LINE, right, bottom)
    canvas.text(4, top + 6, _fitting(labels[1], WIDTH - 20), kind="quiet")
    for tick in y.ticks:
        _, down = own.at(x.low, tick)
        canvas.line(left, down, right, down)
        canvas.text(left - 6, down + 4, short(tick), "end", "quiet")
    for tick in _thinned(x, right - left):
        across, _ = own.at(tick, y.low)
        canvas.line(across, bottom, across, bottom + 4, "axis")
        canvas.text(across, bottom + 17, short(tick), "middle", "quiet")
    canvas.line(left, bottom, right, bottom, "axis")
    canvas.text((left + right) / 2, height - 8, _fitting(labels[0], right - left), "middle", "quiet")
    return own


def _thinned(axis: Axis, room: float) -> list[float]:
    """Return the ticks whose texts have room beside each other."""
    needed = max(len(short(tick)) for tick in axis.ticks) * CHARACTER + 8
    every = max(1, math.ceil(needed * (len(axis.ticks) - 1) / room))
    return list(axis.ticks[::every])


def legend(canvas: Canvas, entries: Sequence[tuple[str, int, str | None]], top: float = 14) -> float:
    """Draw (name, number, dash or None for no line) of series in rows, and return where the next thing can begin."""
    x, y = 4.0, top
    for name, number, dash in entries:
        shown = _fitting(name, WIDTH - 50)
        width = 34 + len(shown) * CHARACTER + 8
        if x > 4 and x + width > WIDTH:
            x, y = 4.0, y + LINE + 2
        if dash is not None:
            canvas.path([(x, y - 4), (x + 26, y - 4)], number, dash)
        canvas.mark(x + 13, y - 4, number)
        canvas.text(x + 32, y, shown)
        x += width
    return y + LINE + 2


def draw_series(own: Plane, series: Series, marks: bool) -> None:
    """Draw the points of a series, the line that joins them, error bars and labels."""
    canvas = own.canvas
    places = [(x + series.shift, y) for x, y in (own.at(*point) for point in series.points)]
    if series.joined:
        canvas.path(places, series.number, dash_of(series))
    for (x, y), half in zip(series.points, series.spread, strict=False):
        ends = [own.at(x, v) for v in (y - half, y + half)]
        canvas.path([(across + series.shift, down) for across, down in ends], series.number)
    if marks or len(places) == 1:
        for place in places:
            canvas.mark(*place, series.number)
    for (x, y), label in zip(places, series.labels, strict=False):
        near_edge = x + 8 + len(label) * CHARACTER > WIDTH
        canvas.text(x - 8 if near_edge else x + 7, max(y - 5, 12), label, "end" if near_edge else "start")


def dash_of(series: Series) -> str:
    """Return how the line of a series is dashed."""
    return DASHES[_turn(series.number) % len(DASHES)]
