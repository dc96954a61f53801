"""Figures as PNG and PDF, for papers and slides: matplotlib draws the shapes of a figure where SVG has them."""

import io
import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ekd_jax.common.errors import UserError
from ekd_jax.common.log import once
from ekd_jax.runs.report.shapes import RADIUS, WIDTH, Box, Figure, Line, Mark, Words, colors

FORMATS = ("png", "pdf")
INCH = 96  # pixels of a page
POINT = 72 / INCH  # points of a pixel
SHARP = 3  # pixels of a PNG for each pixel of a page
TEXT = 11  # pixels; matplotlib's own font is wider than those of browsers, which have 12
ALIGNED = {"start": "left", "middle": "center", "end": "right"}


def check_figures(formats: Sequence[str]) -> None:
    """Check that figures can be drawn in some formats, besides SVG.

    Raises:
        UserError: a format is unknown, or matplotlib, which draws them, is not installed.
    """
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--figures={','.join(formats)}: {name!r} is none of {', '.join(FORMATS)}")
    if formats and not can_draw():
        raise UserError(
            f"--figures={','.join(formats)} needs matplotlib: pip install 'ekd_jax[figures]', or leave it out"
        )


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(figure: Figure, kind: str) -> bytes:
    """Return a figure as the content of a file, in the colors of a light page; it is always the same bytes.

    Args:
        figure: as `charts` makes it.
        kind: of FORMATS. A PNG has three pixels for each of the figure's; a PDF is 10 cm wide, and its text is text.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Page

    palette = colors("light")
    with matplotlib.rc_context(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(
            {"pdf.fonttype": 42, "text.parse_math": False, "lines.scale_dashes": False}
        )
        page = Page((WIDTH / INCH, figure.height / INCH), dpi=SHARP * INCH, facecolor=palette["card"])
        FigureCanvasAgg(page)
        axes = page.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(figure.height, 0))
        axes.set_axis_off()
        for order, shape in enumerate(figure.shapes):
            axes.add_artist(_artist(shape, palette)).set(zorder=order, clip_on=False)
        # No date and no version: the same figure is the same file.
        about: dict[str, Any] = {"Title": figure.title, "Subject": figure.description}
        if kind == "png":
            about = {"Title": figure.title, "Description": figure.description, "Software": None}
        else:
            about |= {"Creator": "ekd_jax", "Producer": None, "CreationDate": None}
        file = io.BytesIO()
        page.savefig(file, format=kind, metadata=about)
    if any("missing from" in str(each.message) for each in warned):
        text = "PNG and PDF figures show boxes for characters that no font of matplotlib has; SVG figures are whole"
        once(logging.WARNING, text)
    return file.getvalue()


def _artist(shape: Words | Line | Box | Mark, palette: dict[str, str]) -> Any:
    """Return what matplotlib calls an artist; its lengths are pixels, and those of lines and text points."""
    from matplotlib import lines, patches, text

    color = palette[shape.color]
    match shape:
        case Words(x, y):
            turned = {"rotation": 90, "rotation_mode": "anchor"} if shape.upwards else {}
            place = {"ha": ALIGNED[shape.anchor], "va": "baseline"} | turned
            return text.Text(x, y, shape.text, color=color, fontsize=TEXT * POINT, **place)
        case Line():
            dashes = (0, [POINT * length for length in shape.dash]) if shape.dash else "-"
            xs, ys = zip(*shape.points, strict=True)
            return lines.Line2D(
                xs,
                ys,
                color=color,
                linewidth=POINT * shape.width,
                linestyle=dashes,
                solid_joinstyle="round",
            )
        case Box(x, y, width, height):
            return patches.Rectangle((x, y), width, height, color=color, alpha=shape.opacity, linewidth=0)
        case Mark():
            edge = {"facecolor": color, "edgecolor": palette["card"], "linewidth": POINT}
            if not shape.corners:
                return patches.Circle((shape.x, shape.y), RADIUS, **edge)
            return patches.Polygon(shape.corners, closed=True, **edge)
