"""The kinds of figures of a report, made of the primitives in `plot`."""

from collections.abc import Sequence

import numpy as np

from ekd_jax.runs.report.plot import (
    HEIGHT,
    Axis,
    Series,
    dash_of,
    draw_series,
    legend,
    linear_axis,
    log_axis,
    plane,
    short,
)
from ekd_jax.runs.report.shapes import CHARACTER, LINE, WIDTH, Canvas, Figure, fitting

WIDE = 4  # largest value over the smallest, from which an axis may be logarithmic
MARKED = 15  # lines of at most so many points have marks
DIGIT = 7.7  # width of a digit where the font is wide; names such as n01440764 are not cut
NAMES = 0.34  # share of the width for names of rows
SHADE = 0.5  # opacity of the darkest cell, on which text is read


def line_chart(
    key: str,
    title: str,
    series: Sequence[Series],
    labels: tuple[str, str],
    log_x: bool = False,
    log_y: bool = False,
    front: Sequence[tuple[float, float]] = (),
    description: str = "",
) -> Figure:
    """Return lines or points over two axes.

    Args:
        key, title, description: as in `Figure`; if not given, the description names the series and their last values.
        series: at least one, each with at least one point.
        labels: of the two axes.
        log_x, log_y: logarithmic axes, unless a value is not above 0 or all are alike.
        front: points of the series that a line of its own joins, such as the Pareto front.
    """
    canvas = Canvas()
    entries = [(each.name, each.number, dash_of(each) if each.joined else None) for each in series]
    top = legend(canvas, entries)
    height = HEIGHT + max(0.0, top - 3 * LINE)  # a long legend takes nothing from the plot
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    ends = [
        y + s * half
        for each in series
        for (_, y), half in zip(each.points, each.spread, strict=False)
        for s in (-1, 1)
    ]
    log_x, log_y = log_x and _wide(xs), log_y and _wide([*ys, *ends])
    across = log_axis(xs) if log_x else linear_axis(xs)
    upwards = log_axis([*ys, *ends]) if log_y else linear_axis([*ys, *ends])
    own = plane(canvas, across, upwards, labels, top, height)
    if front:
        canvas.path([own.at(*point) for point in front], 0, (2, 3))
    for each in series:
        draw_series(own, each, not each.joined or len(each.points) <= MARKED)
    said = "; ".join(
        f"{each.name}: {short(each.points[-1][1])} at {short(each.points[-1][0])}" for each in series
    )
    header = ("", labels[0], labels[1])
    rows = tuple(
        (
            " ".join([each.name, *each.labels[i : i + 1]]),
            f"{x:,.6g}",
            f"{y:.4g} ± {each.spread[i]:.2g}" if each.spread else f"{y:.4g}",
        )
        for each in series
        for i, (x, y) in enumerate(each.points)
    )
    return Figure(
        key,
        title,
        description or f"{labels[1]} over {labels[0]}. {said}.",
        canvas.shapes,
        height,
        header,
        rows,
    )


def _wide(values: Sequence[float]) -> bool:
    """Return whether values can have a logarithmic axis and gain by it; on a narrow one there is hardly a tick."""
    return min(values) > 0 and max(values) >= WIDE * min(values)


def bar_chart(
    key: str, title: str, bars: Sequence[tuple[str, float, int, str]], unit: str, name: str = ""
) -> Figure:
    """Return horizontal bars: (name, value of at least 0, color, text at the end), with the unit above."""
    canvas = Canvas()
    left, row = 8 + min(max(len(each[0]) for each in bars) * CHARACTER, WIDTH * 0.42), 26.0
    room = WIDTH - left - 12 - max(len(each[3]) for each in bars) * CHARACTER
    longest = max(max(each[1] for each in bars), 1e-12)
    canvas.text(4, 14, fitting(unit, WIDTH - 8), quiet=True)
    for i, (label, value, color, text) in enumerate(bars):
        y = LINE + 8 + i * row
        canvas.text(4, y + 14, fitting(label, left - 8))
        canvas.box(left, y + 2, max(room * value / longest, 0.5), row - 8, color)
        canvas.text(left + room * value / longest + 6, y + 14, text)
    rows = tuple((label, text) for label, _, _, text in bars)
    said = "; ".join(f"{label}: {text}" for label, text in rows)
    return Figure(
        key, title, f"{unit}. {said}.", canvas.shapes, LINE + 16 + row * len(bars), (name, unit), rows
    )


def heat_map(
    key: str,
    title: str,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    digits: int,
    names: tuple[str, str],
    signed: bool = False,
    hide_zero: bool = False,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Return a matrix with its numbers: the larger, the darker; signed ones blue above 0 and red below.

    Args:
        key, title: as in `Figure`.
        values: (R, C); nan is left empty.
        rows, columns: names of R rows and C columns.
        digits: after the point.
        names: what rows and columns are.
        signed: color by sign, and write it.
        hide_zero: leave zeros empty.
        limits: values of the lightest and the darkest cell; those of the data if not given.
    """
    canvas = Canvas()
    left = 8 + min(max(map(len, rows)) * DIGIT, WIDTH * NAMES)
    cell = (WIDTH - left - 4) / max(len(columns), 1)
    tall = min(30.0, max(20.0, cell))
    longest = max(map(len, columns)) * DIGIT
    turned = longest > cell - 4
    head = min(longest + 10, 110.0) if turned else 20.0
    canvas.text(4, 12, fitting(f"{names[0]} by {names[1]}", WIDTH - 8), quiet=True)
    top = LINE + head
    for j, name in enumerate(columns):
        x = left + (j + 0.5) * cell
        if turned:
            canvas.text(x + 4, top - 5, fitting(name, head - 8), upwards=True)
        else:
            canvas.text(x, top - 6, name, "middle")
    finite = values[np.isfinite(values)]
    low, high = limits or (min(finite, default=0.0), max(finite, default=1.0))
    scale = float(np.abs(finite).max(initial=1e-12)) if signed else max(float(high - low), 1e-12)

    def written(value: float) -> str:
        if np.isnan(value) or (hide_zero and value == 0):
            return ""
        return f"{value:+.{digits}f}" if signed and round(float(value), digits) else f"{value:.{digits}f}"

    room = max(len(written(v)) for v in values.flat) * CHARACTER <= cell
    for i, name in enumerate(rows):
        y = top + i * tall
        canvas.text(left - 6, y + tall / 2 + 4, fitting(name, left - 8), "end")
        for j, value in enumerate(values[i]):
            if not np.isnan(value):
                part = abs(value) / scale if signed else (value - low) / scale
                color = 2 if signed and value < 0 else 1
                canvas.box(
                    left + j * cell,
                    y,
                    cell - 1,
                    tall - 1,
                    color,
                    max(SHADE * float(np.clip(part, 0, 1)), 0.02),
                )
            if room and (text := written(value)):
                canvas.text(left + (j + 0.5) * cell - 0.5, y + tall / 2 + 4, text, "middle")
    table = tuple((name, *map(written, row)) for name, row in zip(rows, values, strict=True))
    text = f"A matrix: {names[0]} in rows, {names[1]} in columns, from {short(float(low))} to {short(float(high))}."
    return Figure(key, title, text, canvas.shapes, top + tall * len(rows) + 4, (names[0], *columns), table)


def reliability(
    key: str,
    title: str,
    confidence: Sequence[float],
    accuracy: Sequence[float],
    counts: Sequence[int],
    ece: float,
) -> Figure:
    """Return a reliability diagram: accuracy in each bin of confidence, in per cent, against the diagonal."""
    canvas = Canvas()
    ticks = Axis(0.0, 100.0, (0.0, 20.0, 40.0, 60.0, 80.0, 100.0))
    own = plane(canvas, ticks, ticks, ("confidence, per cent", "accuracy, per cent"), 14)
    width = (own.right - own.left) / len(counts)
    for i, (right, count) in enumerate(zip(accuracy, counts, strict=True)):
        if count:
            x, y = own.left + i * width, own.at(0, right)[1]
            canvas.box(x + 1, y, width - 2, max(own.bottom - y, 0.5), 1, 0.35 if count < 10 else 0.85)
    canvas.path([own.at(0, 0), own.at(100, 100)], 0, (4, 4))
    for c, a, n in zip(confidence, accuracy, counts, strict=True):
        if n:
            canvas.mark(*own.at(c, a), 2)
    rows = tuple(
        (
            f"{100 * i / len(counts):.0f} to {100 * (i + 1) / len(counts):.0f}",
            f"{n:,}",
            f"{c:.1f}",
            f"{a:.1f}",
        )
        for i, (c, a, n) in enumerate(zip(confidence, accuracy, counts, strict=True))
        if n
    )
    text = f"Accuracy over confidence in {len(counts)} bins; expected calibration error {ece:.2f} per cent."
    return Figure(
        key,
        title,
        text,
        canvas.shapes,
        HEIGHT,
        ("confidence", "images", "mean confidence", "accuracy"),
        rows,
    )
