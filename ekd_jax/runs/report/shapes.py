"""A figure as a list of shapes, which `svg` and `figure_files` draw: texts, lines, boxes and marks.

Lengths are pixels of a page, from the upper left corner. Colors are names, whose values depend on the scheme, light or
dark. Series differ in color, in their marks and in their dashes, so that color alone says nothing.
"""

import dataclasses
from collections.abc import Sequence

WIDTH = 380
CHARACTER, LINE = 6.6, 16  # width of a character and height of a line of text
# After Okabe and Ito, made darker for a light page and lighter for a dark one: each has a contrast of 3 or more.
LIGHT = ("#1c1d20", "#0072b2", "#d55e00", "#00805e", "#b14a84", "#8f6400", "#2b86b9")
DARK = ("#e8e9eb", "#56b4e9", "#ff8a3d", "#2ccb9b", "#e59ac4", "#f0c03c", "#9fd6f7")
SURFACES = {"light": ("#ffffff", "#d9d9d4", "#5c5f66"), "dark": ("#1d2024", "#363b42", "#a3a8b0")}
MARKS = ("circle", "square", "triangle", "diamond", "cross", "nabla")
RADIUS = 4.5  # half the width of a mark
DASHES = ((), (7, 3), (2, 3), (9, 3, 2, 3), (4, 4), (1, 2))

Point = tuple[float, float]


def colors(scheme: str) -> dict[str, str]:
    """Return the colors of a scheme, "light" or "dark", by name.

    "c0" is the color of text, those of series are "c1", "c2", ...; "card" is the ground, "line" the grid and "quiet"
    axes and less important texts.
    """
    series = LIGHT if scheme == "light" else DARK
    named = dict(zip(("card", "line", "quiet"), SURFACES[scheme], strict=True))
    return named | {f"c{i}": color for i, color in enumerate(series)}


@dataclasses.dataclass(frozen=True)
class Words:
    """A text of one line.

    Attributes:
        x, y: of its base line, where it starts, has its middle, or ends.
        text: plain.
        anchor: "start", "middle" or "end".
        color: "c0" or "quiet".
        upwards: whether it is read from below to above; then it starts at `x`, `y`.
    """

    x: float
    y: float
    text: str
    anchor: str
    color: str
    upwards: bool


@dataclasses.dataclass(frozen=True)
class Line:
    """A line through points; `dash` has the lengths of strokes and gaps in turn, none for a line without gaps."""

    points: tuple[Point, ...]
    color: str
    width: float
    dash: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Box:
    """A filled rectangle; `x` and `y` are of its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    color: str
    opacity: float


@dataclasses.dataclass(frozen=True)
class Mark:
    """The mark of a point: a filled polygon with an edge in the color of the ground; without corners, a circle."""

    x: float
    y: float
    corners: tuple[Point, ...]
    color: str


Shape = Words | Line | Box | Mark


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure, and the same numbers as a table.

    Attributes:
        key: its name as a file, such as "cost-parameters".
        title: one line.
        description: what it shows, for those who do not see it.
        shapes: in the order in which they are drawn.
        height: in pixels; it is WIDTH wide.
        header, rows: the numbers.
    """

    key: str
    title: str
    description: str
    shapes: tuple[Shape, ...]
    height: float
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Canvas:
    """Collects the shapes of a figure."""

    def __init__(self) -> None:
        self._shapes: list[Shape] = []

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes so far, in order."""
        return tuple(self._shapes)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        anchor: str = "start",
        quiet: bool = False,
        upwards: bool = False,
    ) -> None:
        """Write a text; `y` is its base line."""
        self._shapes.append(Words(x, y, text, anchor, "quiet" if quiet else "c0", upwards))

    def rule(self, x1: float, y1: float, x2: float, y2: float, color: str = "line") -> None:
        """Draw a thin straight line of the grid, or, with the color "quiet", of an axis."""
        self._shapes.append(Line(((x1, y1), (x2, y2)), color, 1, ()))

    def path(self, points: Sequence[Point], number: int, dash: tuple[int, ...] = ()) -> None:
        """Join points by a line in the color of a series."""
        self._shapes.append(Line(tuple(points), color_of(number), 2, dash))

    def box(
        self, x: float, y: float, width: float, height: float, color: int, opacity: float = 1.0
    ) -> None:
        """Fill a rectangle."""
        self._shapes.append(Box(x, y, width, height, f"c{color}", opacity))

    def mark(self, x: float, y: float, number: int) -> None:
        """Draw the mark of a series."""
        shapes: dict[str, list[Point]] = {
            "circle": [],
            "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
            "triangle": [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
            "nabla": [(0, 1.2), (1.1, -0.9), (-1.1, -0.9)],
            "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
            "cross": [
                *((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)),
                *((0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
            ],
        }
        corners = shapes[MARKS[turn(number) % len(MARKS)]]
        places = tuple((x + RADIUS * dx, y + RADIUS * dy) for dx, dy in corners)
        self._shapes.append(Mark(x, y, places, color_of(number)))


def color_of(number: int) -> str:
    """Return the color of the series with a number: "c0" for 0; those from 1 come again after the last."""
    return f"c{1 + (number - 1) % (len(LIGHT) - 1) if number else 0}"


def turn(number: int) -> int:
    """Return the place of a series in marks and dashes: when a color comes again, it is with others."""
    return number + max(0, number - 1) // (len(LIGHT) - 1)


def fitting(text: str, room: float) -> str:
    """Return a text, cut to the room that it has in pixels."""
    most = max(1, int(room / CHARACTER))
    return text if len(text) <= most else f"{text[: most - 1]}…"
