"""The parts of charts: axes with ticks, a legend, and series of points."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from ekd_jax.runs.report.shapes import (
    CHARACTER,
    DASHES,
    LINE,
    WIDTH,
    Canvas,
    fitting,
    turn,
)

HEIGHT = 270  # of a chart whose legend is short


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
    canvas.text(4, top + 6, fitting(labels[1], WIDTH - 20), quiet=True)
    for tick in y.ticks:
        _, down = own.at(x.low, tick)
        canvas.rule(left, down, right, down)
        canvas.text(left - 6, down + 4, short(tick), "end", quiet=True)
    for tick in _thinned(x, right - left):
        across, _ = own.at(tick, y.low)
        canvas.rule(across, bottom, across, bottom + 4, "quiet")
        canvas.text(across, bottom + 17, short(tick), "middle", quiet=True)
    canvas.rule(left, bottom, right, bottom, "quiet")
    canvas.text((left + right) / 2, height - 8, fitting(labels[0], right - left), "middle", quiet=True)
    return own


def _thinned(axis: Axis, room: float) -> list[float]:
    """Return the ticks whose texts have room beside each other."""
    needed = max(len(short(tick)) for tick in axis.ticks) * CHARACTER + 8
    every = max(1, math.ceil(needed * (len(axis.ticks) - 1) / room))
    return list(axis.ticks[::every])


def legend(
    canvas: Canvas, entries: Sequence[tuple[str, int, tuple[int, ...] | None]], top: float = 14
) -> float:
    """Draw (name, number, dash or None for no line) of series in rows, and return where the next thing can begin."""
    x, y = 4.0, top
    for name, number, dash in entries:
        shown = fitting(name, WIDTH - 50)
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
        # The Pareto front rises: below it on the right, and above it on the left, there is room.
        if x + 8 + len(label) * CHARACTER > WIDTH:
            canvas.text(x - 8, max(y - 5, 12), label, "end")
        else:
            canvas.text(x + 7, min(y + 13, own.bottom - 3), label)


def dash_of(series: Series) -> tuple[int, ...]:
    """Return how the line of a series is dashed."""
    return DASHES[turn(series.number) % len(DASHES)]
