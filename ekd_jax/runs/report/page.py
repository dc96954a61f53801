"""The report as files: one HTML page that needs nothing else, Markdown, and its figures and images."""

import base64
import html
import importlib.resources
import pathlib
import re
from collections.abc import Sequence

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import replacing
from ekd_jax.common.progress import Progress
from ekd_jax.common.text import markdown_table
from ekd_jax.runs.report.answers import answer_sections
from ekd_jax.runs.report.document import (
    Document,
    Figures,
    Missing,
    Part,
    Pictures,
    Section,
    Table,
    Text,
)
from ekd_jax.runs.report.figure_files import check_figures, draw
from ekd_jax.runs.report.predictions import ask, not_asked
from ekd_jax.runs.report.reading import Group, find_runs, read_groups
from ekd_jax.runs.report.results import (
    accuracy_section,
    cost_section,
    curves_section,
    runs_section,
    time_section,
)
from ekd_jax.runs.report.shapes import Figure
from ekd_jax.runs.report.svg import style, svg
from ekd_jax.version import __version__

PAGE, MARKDOWN, FIGURES, IMAGES = "report.html", "report.md", "figures", "images"


def write_report(
    runs: Sequence[str], output: pathlib.Path, predictions: bool = True, formats: Sequence[str] = ()
) -> Document:
    """Write a report on runs to a new directory: everything or nothing.

    Args:
        runs: directories of runs, complete or not, or of comparisons.
        output: the new directory.
        predictions: also let the networks predict the test images.
        formats: of FORMATS, in which figures are written besides SVG.

    Raises:
        UserError: a directory is no run, runs are of different data, the output exists or cannot be written, or
            matplotlib is missing and needed.
    """
    check_new(output)
    check_figures(formats)
    document = make_document(read_groups(find_runs(runs)), predictions)
    try:
        with replacing(output) as partial:
            _write(document, partial, formats)
    except OSError as error:
        raise UserError(
            f"cannot write --output={output}: {reason(error)}; nothing of it is left"
        ) from error
    return document


def check_new(output: pathlib.Path) -> None:
    """Raise UserError unless a directory does not exist yet, or is empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output} exists: choose a new directory, or remove it")


def make_document(groups: Sequence[Group], predictions: bool = True) -> Document:
    """Return the report on groups of runs; a part that cannot be had says why.

    Args:
        groups: as `read_groups` returns them.
        predictions: also let the networks predict the test images.
    """
    asked = ask(groups) if predictions else not_asked(groups)
    sections = (
        runs_section(groups),
        accuracy_section(groups),
        cost_section(groups),
        time_section(groups),
        curves_section(groups),
        *answer_sections(asked, groups),
    )
    data = groups[0].run.config.data.name
    networks = list(dict.fromkeys(str(group.run.config.model.name) for group in groups))
    count = sum(len(group.runs) for group in groups)
    title = f"{', '.join(networks[:3])}{' and others' * (len(networks) > 3)} on {data}"
    description = groups[0].run.description.data
    tested = f"{description.test_examples:,} test images" if description else "its test images"
    about = f"A report on {count} run{'s' * (count > 1)}, tested on {tested} of {data}. All accuracies are in per cent."
    return Document(title, about, sections)


def _write(document: Document, folder: pathlib.Path, formats: Sequence[str]) -> None:
    (folder / FIGURES).mkdir(parents=True)
    (folder / PAGE).write_text(as_html(document), encoding="utf-8")
    (folder / MARKDOWN).write_text(as_markdown(document), encoding="utf-8")
    progress = Progress("figures", len(document.figures), unit="figures")
    for figure in document.figures:
        file = folder / FIGURES / f"{figure.key}.svg"
        file.write_text(svg(figure, alone=True) + "\n", encoding="utf-8")
        for kind in formats:
            file.with_suffix(f".{kind}").write_bytes(draw(figure, kind))
        progress.add(1)
    progress.clear()
    for name, png in _images(document).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(png)


def _images(document: Document) -> dict[str, bytes]:
    parts = [part for section in document.sections for part in section.parts]
    return {
        _image_name(part, i, j): each.png
        for part in parts
        if isinstance(part, Pictures)
        for i, (_, pictures) in enumerate(part.rows)
        for j, each in enumerate(pictures)
    }


def _image_name(part: Pictures, row: int, column: int) -> str:
    return f"{IMAGES}/{part.key}-{row + 1}-{column + 1}.png"


# --- HTML ----------------------------------------------------------------------------------------


def as_html(document: Document) -> str:
    """Return the page: readable without scripts, and nothing is loaded from anywhere."""
    sheet = (importlib.resources.files(__package__) / "page.css").read_text().strip()
    links = "".join(f'<li><a href="#{s.key}">{html.escape(s.title)}</a></li>' for s in document.sections)
    sections = "\n".join(map(_section, document.sections))
    title = html.escape(document.title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<!-- Everything is in this file. The browser is told to load nothing, and to run nothing. -->
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style()}
{sheet}
</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>{title}</h1>
<p>{html.escape(document.about)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main id="main">
{sections}
</main>
<footer><p>ekd_jax {__version__}, <code>ekd report</code></p></footer>
</body>
</html>
"""


def _section(section: Section) -> str:
    parts = "\n".join(map(_part, section.parts))
    name = f"{section.key}-heading"
    title = f'<h2 id="{name}">{html.escape(section.title)}</h2>'
    return f'<section id="{section.key}" aria-labelledby="{name}">{title}\n{parts}\n</section>'


def _part(part: Part) -> str:
    match part:
        case Text():
            return f"<p>{_prose(part.text)}</p>"
        case Missing():
            return f'<p class="missing"><strong>{html.escape(part.what)}:</strong> left out, {_prose(part.reason)}.</p>'
        case Table():
            return _table(part.caption, part.header, part.rows)
        case Figures():
            title = f"<h3>{html.escape(part.title)}</h3>" if part.title else ""
            return f'{title}<div class="figures">{"".join(map(_figure, part.figures))}</div>'
        case Pictures():
            return _pictures(part)


def _prose(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _figure(figure: Figure) -> str:
    title = html.escape(figure.title)
    table = _table(figure.title, figure.header, figure.rows)
    numbers = f'<summary>Numbers<span class="hidden"> of: {title}</span></summary>{table}'
    return f"<figure><figcaption>{title}</figcaption>{svg(figure)}<details>{numbers}</details></figure>"


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = list(zip(*rows, strict=True)) if rows else []
    numeric = [all(re.match(r"[-+]?[\d.,]|$|-$", cell) for cell in column) for column in columns]
    kinds = [' class="number"' if i and i < len(numeric) and numeric[i] else "" for i in range(len(header))]
    head = "".join(
        f'<th scope="col"{kind}>{html.escape(name)}</th>' if name else f"<td{kind}></td>"
        for name, kind in zip(header, kinds, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(
            f"<td{kind}>{html.escape(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return _scrolled(caption, head, body)


def _pictures(part: Pictures) -> str:
    rows = []
    for name, pictures in part.rows:
        cells = "".join(
            f'<td><img src="data:image/png;base64,{base64.b64encode(each.png).decode()}" '
            f'alt="{html.escape(each.description)}" width="72"><br>{html.escape(each.text)}</td>'
            for each in pictures
        )
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in part.header)
    return _scrolled(part.caption, f"<td></td>{head}", "".join(rows), " pictures")


def _scrolled(caption: str, head: str, body: str, kind: str = "") -> str:
    """Return a table in a box of its own, which scrolls, also by the keyboard."""
    name = html.escape(caption)
    return (
        f'<div class="scroll{kind}" tabindex="0" role="region" aria-label="{name}"><table><caption>{name}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# --- Markdown ------------------------------------------------------------------------------------


def as_markdown(document: Document) -> str:
    """Return the report as Markdown, with links to its figures and images."""
    lines = [f"# {_plain(document.title)}", document.about]
    for section in document.sections:
        lines.append(f"## {section.title}")
        lines += [text for part in section.parts for text in _markdown(part)]
    return "\n\n".join(lines) + "\n"


def _markdown(part: Part) -> list[str]:
    match part:
        case Text():
            return [part.text]
        case Missing():
            return [f"*{_plain(part.what)}: left out, {part.reason}.*"]
        case Table():
            return [_plain(part.caption), _markdown_table(part.header, part.rows)]
        case Figures():
            title = [f"### {_plain(part.title)}"] if part.title else []
            return [*title, *(f"![{_plain(f.title)}]({FIGURES}/{f.key}.svg)" for f in part.figures)]
        case Pictures():
            rows = [
                (
                    name,
                    *(
                        f"![{_plain(p.description)}]({_image_name(part, i, j)}) {p.text}"
                        for j, p in enumerate(pictures)
                    ),
                )
                for i, (name, pictures) in enumerate(part.rows)
            ]
            return [_plain(part.caption), _markdown_table(("", *part.header), rows)]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table([list(map(_plain, row)) for row in rows], list(map(_plain, header)))


def _plain(text: str) -> str:
    """Return a text in one line, in which nothing ends a cell of a table."""
    return " ".join(text.replace("|", "\\|").split())
