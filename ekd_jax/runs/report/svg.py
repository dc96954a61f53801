"""Figures as SVG: readable without scripts, with a title and a description, in the colors of the page around them."""

from xml.sax.saxutils import escape, quoteattr

from ekd_jax.runs.report.shapes import LIGHT, RADIUS, WIDTH, Box, Figure, Line, Mark, Shape, Words, colors

RULES = {"line": "grid", "quiet": "axis"}  # classes of thin lines by color


def style() -> str:
    """Return the style of figures, with the colors of both schemes."""
    classes = "".join(f".c{i}{{color:var(--c{i})}}" for i in range(len(LIGHT)))
    rules = (
        ".figure{display:block;width:100%;height:auto}"
        ".figure text{font:12px system-ui,sans-serif;fill:var(--c0)}.figure text.quiet{fill:var(--quiet)}"
        ".figure .grid{stroke:var(--line);stroke-width:1}.figure .axis{stroke:var(--quiet);stroke-width:1}"
        ".figure .line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}"
        ".figure .mark{fill:currentColor;stroke:var(--card);stroke-width:1}"
    )
    light, dark = (f":root{{{_variables(scheme)}}}" for scheme in ("light", "dark"))
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}{rules}{classes}"


def _variables(scheme: str) -> str:
    return "".join(f"--{name}:{color};" for name, color in colors(scheme).items())


def svg(figure: Figure, alone: bool = False) -> str:
    """Return a figure as an SVG element, or as a file of its own with its style."""
    own = f"<style>{escape(style())}</style>" if alone else ""
    name = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    size = f' width="{WIDTH}" height="{figure.height:g}"' if alone else ""
    surface = f'<rect width="{WIDTH}" height="{figure.height:g}" fill="var(--card)"/>' if alone else ""
    ids = f"{figure.key}-title", f"{figure.key}-text"
    box = f'viewBox="0 0 {WIDTH} {figure.height:g}"{size}'
    body = "".join(map(_element, figure.shapes))
    return (
        f'<svg{name} class="figure" id={quoteattr(figure.key)} {box} role="img" '
        f'aria-labelledby="{ids[0]} {ids[1]}"><title id="{ids[0]}">{escape(figure.title)}</title>'
        f'<desc id="{ids[1]}">{escape(figure.description)}</desc>{own}{surface}{body}</svg>'
    )


def _element(shape: Shape) -> str:
    match shape:
        case Words(x, y):
            kind = ' class="quiet"' if shape.color == "quiet" else ""
            where = "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
            turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if shape.upwards else ""
            return f'<text x="{x:.1f}" y="{y:.1f}"{where}{kind}{turned}>{escape(shape.text)}</text>'
        case Line(((x1, y1), (x2, y2)), color) if color in RULES:
            return f'<line class="{RULES[color]}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        case Line():
            dashes = f' stroke-dasharray="{" ".join(map(str, shape.dash))}"' if shape.dash else ""
            return f'<polyline class="line {shape.color}" points="{_places(shape.points)}"{dashes}/>'
        case Box(x, y):
            shade = "" if shape.opacity == 1 else f' fill-opacity="{shape.opacity:.2f}"'
            size = f'width="{shape.width:.1f}" height="{shape.height:.1f}"'
            return f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="var(--{shape.color})"{shade}/>'
        case Mark(x, y, ()):
            return f'<circle class="mark {shape.color}" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"/>'
        case Mark():
            return f'<polygon class="mark {shape.color}" points="{_places(shape.corners)}"/>'


def _places(points: tuple[tuple[float, float], ...]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
