"""Numbers, times and tables as text."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def megabytes(count: float) -> str:
    """Return bytes in megabytes: "12 MB"."""
    return f"{count / 1e6:,.0f} MB"


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss: 75 is "0:01:15"."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def table(rows: list[list[Any]], header: list[str]) -> str:
    """Return a table whose first column is aligned to the left and whose others are to the right."""
    cells = [header, *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: list[str]) -> str:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def markdown_table(rows: list[list[str]], header: list[str]) -> str:
    """Return a table in Markdown, aligned as `table` aligns it."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def printable(text: str) -> str:
    """Return text in one line that any stream can write: control characters, and bytes of file names that are
    not UTF-8, are escaped."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def human(count: float) -> str:
    """Return a count in short: "41.3M", "12.5k"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"


def three_digits(value: float) -> str:
    """Return a number with three digits, or with all before the point: "0.150", "12.3", "4,567"."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV, with quotes where a value needs them."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
