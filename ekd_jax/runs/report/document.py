"""A report as sections of texts, tables, figures and images, which `page` writes as HTML and Markdown."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ekd_jax.runs.report.shapes import Figure

NO_RESULT = "-"
LEAST_SIDE = 72  # smaller images are enlarged to so many pixels or more
# Anchors of Matplotlib's viridis (van der Walt and Smith, CC0): equal steps look equal, also to color-blind readers.
VIRIDIS = np.array(
    [(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
     (170, 220, 50), (253, 231, 37)]
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Missing:
    """A part that is left out, and why."""

    what: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table, whose first column names the rows.

    Attributes:
        caption: what it shows.
        header: names of the columns.
        rows: as many cells each.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures side by side, with a title for all of them; it may be empty."""

    title: str
    figures: tuple[Figure, ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image: PNG, its text below, and what it shows for those who do not see it."""

    png: bytes
    text: str
    description: str


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Rows of images.

    Attributes:
        key: their name as files, before the number.
        caption: what they show.
        header: names of the columns.
        rows: the name of each row, and its images.
    """

    key: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Picture, ...]], ...]


Part = Text | Missing | Table | Figures | Pictures


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a report: its name in links, its title, and its parts."""

    key: str
    title: str
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Document:
    """A report: its title, a sentence on what it is of, and its sections."""

    title: str
    about: str
    sections: tuple[Section, ...]

    @property
    def figures(self) -> list[Figure]:
        """All figures."""
        parts = [part for section in self.sections for part in section.parts]
        return [figure for part in parts if isinstance(part, Figures) for figure in part.figures]


def picture(pixels: np.ndarray, text: str, description: str, heat: np.ndarray | None = None) -> Picture:
    """Return an image as PNG, enlarged if it is small, perhaps with a map laid over it.

    Args:
        pixels: (H, W, C) uint8, of one or three channels.
        text: below it.
        description: for those who do not see it.
        heat: (H, W), at least 0; it is scaled to its largest value.
    """
    colors = pixels.repeat(3, -1) if pixels.shape[-1] == 1 else pixels
    if heat is not None:
        colors = (
            (0.4 * colors + 0.6 * viridis(heat / max(float(heat.max()), 1e-12))).round().astype(np.uint8)
        )
    times = max(1, -(-LEAST_SIDE // max(colors.shape[:2])))
    file = io.BytesIO()
    Image.fromarray(colors.repeat(times, 0).repeat(times, 1)).save(file, "PNG", optimize=True)
    return Picture(file.getvalue(), text, description)


def viridis(shares: np.ndarray) -> np.ndarray:
    """Return colors (..., 3) float of numbers from 0 to 1."""
    places = np.clip(shares, 0, 1) * (len(VIRIDIS) - 1)
    channels = [np.interp(places, np.arange(len(VIRIDIS)), VIRIDIS[:, c]) for c in range(3)]
    return np.stack(channels, -1)


def heading(name: str) -> str:
    """Return a predictor's name in words: "student 1"."""
    return name.replace("_", " ")


def listed(names: Sequence[str]) -> str:
    """Return names as in a sentence: "a, b and c"."""
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)
