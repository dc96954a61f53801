"""How drawings look in a data set, measured on its images, so that a page can bring a new drawing to the same form."""

import dataclasses

import numpy as np

PLAIN = 0.1  # share of the range of pixels that a plain background varies by
LEAST_BACKGROUND = 1 / 3  # of all pixels
LEAST_PLAIN = 0.9  # of the images: those whose border is background
COVERED = (
    0.8  # of a row or column at the end of a drawing, which is round there, for it to count as a whole one
)
BLUR = 0.9  # of the width of a stroke whose outline is blurred; this, and `COVERED`, read most drawings on 8 x 8 pixels
MOST_STRETCH = 2.0  # a stroke that is nearly straight, such as a 1, would become a blot
VARYING = 0.2  # deviation of the widths, as a share of their mean, above which proportions are kept


@dataclasses.dataclass(frozen=True)
class Drawings:
    """The form of drawings in gray images (H, W). Lengths are in pixels, from the top left corner.

    Attributes:
        background: value of pixels without ink.
        ink: value of pixels full of ink; above or below the background.
        height: from the top to the bottom of a drawing, with its stroke.
        width: from the left to the right.
        stroke: width of the stroke.
        most_stretch: by how much the proportions of a drawing may be changed so that it fills both height and width;
            1 keeps them.
        by_mass: whether the center of a drawing is its center of mass; otherwise, that of its height and width.
        center: y and x of that center.
    """

    background: float
    ink: float
    height: float
    width: float
    stroke: float
    most_stretch: float
    by_mass: bool
    center: tuple[float, float]


def measure_drawings(images: np.ndarray) -> Drawings | None:
    """Return the form of the drawings in images (N, H, W, C) uint8, None if they are no drawings.

    Drawings are gray, and most of their border has one value, that of a plain background. No label is used. Scanned
    digits were sized and centered in one of two ways, as MNIST (with their own proportions, by the center of mass) or
    as the UCI digits (stretched to a box, by the center of the box): what varies less over the images tells which.
    """
    if images.shape[-1] != 1 or min(images.shape[1:3]) < 4:
        return None
    values = images[..., 0].astype(np.float64)
    border = np.concatenate([values[:, 0], values[:, -1], values[:, :, 0], values[:, :, -1]], 1)
    background = float(np.median(border))
    darker = values.mean() < background
    ink_value = float(np.percentile(values, 2 if darker else 98))
    if ink_value == background:
        return None
    ink = np.clip((values - background) / (ink_value - background), 0, 1)
    plain = np.abs(values - background) <= PLAIN * abs(ink_value - background)
    of_border = np.abs(np.median(border, 1) - background) <= PLAIN * abs(ink_value - background)
    ink = ink[ink.sum((1, 2)) > 1]
    if plain.mean() < LEAST_BACKGROUND or of_border.mean() < LEAST_PLAIN or not len(ink):
        return None
    rows, columns = ink.max(2), ink.max(1)  # (N, H), (N, W)
    heights, widths = (np.minimum(each / COVERED, 1).sum(1) for each in (rows, columns))
    boxes = np.stack([_middles(rows), _middles(columns)], 1)
    masses = np.stack([_centers(ink.sum(2)), _centers(ink.sum(1))], 1)
    by_mass = bool(masses.var(0).sum() < boxes.var(0).sum())
    keep = bool(widths.std() > VARYING * widths.mean())
    return Drawings(
        background=background,
        ink=ink_value,
        height=float(np.percentile(heights, 90) if keep else np.median(heights)),
        width=float(np.percentile(widths, 90) if keep else np.median(widths)),
        stroke=BLUR
        * float(np.median(2 * ink.sum((1, 2)) / _outlines(ink))),  # a line's area: width * outline / 2
        most_stretch=1.0 if keep else MOST_STRETCH,
        by_mass=by_mass,
        center=tuple(np.median(masses if by_mass else boxes, 0).tolist()),
    )


def _centers(mass: np.ndarray) -> np.ndarray:
    """Return the centers of mass (N,) of profiles (N, L)."""
    return np.asarray((mass * (np.arange(mass.shape[1]) + 0.5)).sum(1) / mass.sum(1))


def _middles(profiles: np.ndarray) -> np.ndarray:
    """Return the middles (N,) between the ends of profiles (N, L), whose last pixels are covered in part."""
    inked = profiles > PLAIN
    first, last = inked.argmax(1), profiles.shape[1] - 1 - inked[:, ::-1].argmax(1)
    each = np.arange(len(profiles))
    return np.asarray((first + 1 - profiles[each, first] + last + profiles[each, last]) / 2)


def _outlines(ink: np.ndarray) -> np.ndarray:
    """Return the lengths (N,) of the outlines of drawings (N, H, W): the sum of what changes between pixels."""
    framed = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    return np.asarray(
        np.hypot(np.diff(framed, axis=1)[:, :, 1:], np.diff(framed, axis=2)[:, 1:]).sum((1, 2))
    )
