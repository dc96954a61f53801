"""Draw digits with the mouse on a page that `ekd export --format=html` wrote, and count how many each network reads.

    python benchmarks/drawings.py --page=exported/page/student.html [--each=12] [--seed=0]

Chromium opens the page and gets the events of a mouse. A drawing is one of the usual ways to write a digit, of random
size, place, slant, proportions and unsteadiness. Classes are the digits 0 to 9, in this order.
"""

import argparse
import pathlib
import sys
from collections import Counter

import numpy as np

from ekd_jax.students.formats.chromium import Chromium, chromium, find_chromium

Stroke = np.ndarray  # (N, 2): x, y from the top left corner


def line(*corners: tuple[float, float]) -> Stroke:
    """Return a stroke along straight lines, with points at even distances."""
    points = np.array(corners, float)
    far = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    at = np.linspace(0, far[-1], max(3, int(far[-1] * 15)))
    return np.stack([np.interp(at, far, points[:, axis]) for axis in (0, 1)], 1)


def arc(x: float, y: float, wide: float, high: float, begin: float, end: float) -> Stroke:
    """Return a part of an ellipse around (x, y); angles in degrees, clockwise, 0 is to the right."""
    angle = np.radians(np.linspace(begin, end, max(4, int(abs(end - begin) / 10))))
    return np.stack([x + wide * np.cos(angle), y + high * np.sin(angle)], 1)


def joined(*parts: Stroke) -> Stroke:
    """Return strokes as one, without lifting the pen."""
    return line(*map(tuple, np.concatenate(parts)))


WAYS: dict[int, list[list[Stroke]]] = {
    0: [[arc(0.5, 0.5, 0.32, 0.5, -90, -450)], [arc(0.5, 0.5, 0.4, 0.48, -60, -430)],
        [arc(0.5, 0.5, 0.24, 0.5, -100, 265)]],
    1: [[line((0.5, 0), (0.5, 1))], [line((0.28, 0.25), (0.52, 0), (0.52, 1))],
        [line((0.3, 0.22), (0.5, 0), (0.5, 1)), line((0.25, 1), (0.75, 1))]],
    2: [[joined(arc(0.5, 0.28, 0.34, 0.28, -170, 35), line((0.78, 0.45), (0.15, 1), (0.88, 1)))],
        [joined(arc(0.48, 0.27, 0.3, 0.27, -150, 60), line((0.6, 0.55), (0.15, 0.97), (0.85, 1)))],
        [joined(line((0.15, 0.1), (0.5, 0)), arc(0.55, 0.28, 0.28, 0.28, -90, 50), line((0.2, 1), (0.85, 0.95)))]],
    3: [[joined(arc(0.45, 0.25, 0.32, 0.25, -160, 90), arc(0.45, 0.74, 0.36, 0.26, -90, 160))],
        [joined(line((0.15, 0.02), (0.8, 0.02), (0.42, 0.42)), arc(0.42, 0.71, 0.38, 0.29, -90, 155))],
        [joined(arc(0.45, 0.27, 0.3, 0.27, -140, 80), arc(0.42, 0.75, 0.4, 0.25, -80, 140))]],
    4: [[line((0.3, 0), (0.12, 0.6), (0.88, 0.6)), line((0.66, 0.25), (0.66, 1))],
        [line((0.65, 1), (0.65, 0), (0.1, 0.66), (0.92, 0.66))],
        [line((0.2, 0), (0.2, 0.5), (0.8, 0.5)), line((0.8, 0), (0.8, 1))]],
    5: [[joined(line((0.25, 0), (0.2, 0.45)), arc(0.45, 0.7, 0.37, 0.3, -130, 150)), line((0.25, 0), (0.82, 0))],
        [joined(line((0.82, 0), (0.25, 0), (0.2, 0.42)), arc(0.45, 0.69, 0.36, 0.31, -130, 140))],
        [joined(line((0.8, 0.03), (0.3, 0.03), (0.25, 0.4), (0.5, 0.4)), arc(0.45, 0.7, 0.35, 0.3, -80, 150))]],
    6: [[joined(arc(0.75, 0.62, 0.6, 0.62, -100, -180), arc(0.48, 0.7, 0.33, 0.3, -180, -540))],
        [joined(line((0.62, 0), (0.25, 0.5)), arc(0.5, 0.7, 0.32, 0.3, -160, -520))],
        [joined(line((0.3, 0), (0.18, 0.6)), arc(0.48, 0.72, 0.3, 0.28, -180, -560))]],
    7: [[line((0.12, 0), (0.88, 0), (0.4, 1))],
        [line((0.15, 0.03), (0.85, 0), (0.35, 1)), line((0.35, 0.5), (0.8, 0.5))],
        [joined(line((0.12, 0.05), (0.85, 0.02)), line((0.85, 0.02), (0.55, 0.5), (0.48, 1)))]],
    8: [[joined(arc(0.5, 0.25, 0.28, 0.25, -40, -270), arc(0.5, 0.74, 0.33, 0.26, -90, 270),
                arc(0.5, 0.25, 0.28, 0.25, 90, -40))],
        [arc(0.5, 0.25, 0.27, 0.25, -90, -450), arc(0.5, 0.75, 0.33, 0.25, -90, -450)],
        [line((0.75, 0.1), (0.45, 0.02), (0.28, 0.2), (0.72, 0.75), (0.55, 0.98),
              (0.28, 0.85), (0.38, 0.6), (0.75, 0.1))]],
    9: [[joined(arc(0.5, 0.28, 0.3, 0.28, -20, -340), line((0.8, 0.25), (0.75, 1)))],
        [joined(arc(0.48, 0.28, 0.3, 0.28, -10, -350), arc(0.35, 0.3, 0.44, 0.7, 0, 110))],
        [joined(arc(0.5, 0.26, 0.32, 0.26, 0, -360), line((0.82, 0.26), (0.62, 1)))]],
}  # fmt: skip


def write(digit: int, draws: np.random.Generator) -> list[Stroke]:
    """Return the strokes of a digit as somebody may write it, within the unit square."""
    strokes = WAYS[digit][draws.integers(len(WAYS[digit]))]
    size, slant, wide = draws.uniform(0.45, 0.8), draws.normal(0.08, 0.1), draws.uniform(0.55, 0.85)
    left, top = draws.uniform(0.08, 0.92 - size * 0.85), draws.uniform(0.08, 0.92 - size)
    turned = draws.normal(0, 0.06)
    written = []
    for stroke in strokes:
        x, y = stroke.T
        far = np.linspace(0, 1, len(x))
        for _ in range(2):  # a hand is unsteady, but not from point to point
            x = x + draws.normal(0, 0.02) * np.sin(
                2 * np.pi * (far * draws.uniform(0.5, 2.5) + draws.random())
            )
            y = y + draws.normal(0, 0.02) * np.sin(
                2 * np.pi * (far * draws.uniform(0.5, 2.5) + draws.random())
            )
        x, y = (x - 0.5) * wide + (0.5 - y) * slant, y - 0.5
        x, y = x - turned * y, y + turned * x
        written.append(np.stack([left + size * (x + 0.45), top + size * (y + 0.5)], 1).clip(0.02, 0.98))
    return written


def draw(page: Chromium, strokes: list[Stroke]) -> None:
    """Draw strokes on the page with the mouse, after clearing it, and wait for the classes."""
    left, top, width = page.evaluate(
        "(() => { document.getElementById('clear').click(); const stage = document.getElementById('stage');"
        " stage.scrollIntoView({block: 'center'}); const { left, top, width } = stage.getBoundingClientRect();"
        " return [left, top, width]; })()"
    )
    for stroke in strokes:
        places = stroke * width + (left, top)
        kinds = ["mousePressed", *["mouseMoved"] * (len(places) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*places, places[-1]], strict=True):
            page.send(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1
            )
    page.evaluate("ekd.settled()")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=pathlib.Path, required=True, help="a page that `ekd export` wrote")
    parser.add_argument("--each", type=int, default=12, help="drawings of each digit")
    parser.add_argument("--seed", type=int, default=0, help="of the drawings")
    asked = parser.parse_args()
    path = find_chromium()
    if path is None:
        sys.exit("no Chromium was found")
    draws = np.random.default_rng(asked.seed)
    with chromium(path) as page:
        page.open(asked.page)
        page.evaluate("ekd.measured")
        facts = page.evaluate("ekd.facts")
        if not facts["drawings"] or len(facts["classes"]) != 10:
            sys.exit("the page takes no drawings of digits")
        right: Counter[tuple[str, int]] = Counter()
        for digit in range(10):
            for _ in range(asked.each):
                draw(page, write(digit, draws))
                answers = page.evaluate(
                    "[...document.querySelectorAll('.answer b')].map(b => b.textContent)"
                )
                for student, answer in zip(facts["students"], answers, strict=True):
                    right[student["name"], digit] += answer == facts["classes"][digit]
    print(
        f"{'read rightly':<14}"
        + "".join(f"{digit:>5}" for digit in range(10))
        + f"  all of {10 * asked.each}"
    )
    for student in facts["students"]:
        each = [right[student["name"], digit] for digit in range(10)]
        print(f"{student['name']:<14}" + "".join(f"{number:>5}" for number in each) + f"  {sum(each):>6}")


if __name__ == "__main__":
    main()
