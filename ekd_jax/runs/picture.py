"""The status of a run, drawn for a terminal by Rich: a bar, and a table of students x metrics."""

import io

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ekd_jax.common.text import clock, megabytes
from ekd_jax.runs.status import COMPLETE, NOT_STARTED, RUNNING, RunStatus, columns, fitting, overview, title

STYLES = {RUNNING: "bold green", COMPLETE: "bold blue", NOT_STARTED: "dim"}
MARGIN = 2  # at the left
MOST_WIDE = 110  # columns of a terminal that are used


def draw(status: RunStatus, width: int, height: int | None = None, doing: str = "") -> str:
    """Return a status as text for a terminal, with colors unless $NO_COLOR is set.

    Args:
        status: of a run, or of several.
        width: columns of the terminal.
        height: lines of the terminal; what does not fit is cut off. None: everything.
        doing: what is done at the moment, such as "compiling".
    """
    lines = overview(status).splitlines() if status.several else _lines(status, width - 1, doing)
    if status.several:
        lines = [line[: width - 1] for line in lines]
    return "\n".join(lines[: height - 1] if height else lines)


def _lines(status: RunStatus, width: int, doing: str) -> list[str]:
    console = Console(
        file=io.StringIO(), width=min(width, MOST_WIDE), force_terminal=True, highlight=False, emoji=False
    )
    with console.capture() as shown:
        console.print(_picture(status, console.width - MARGIN, doing))
    return shown.get().rstrip("\n").split("\n")


def _picture(status: RunStatus, width: int, doing: str) -> RenderableType:
    run, place = status.current, f"{status.place}: " if status.place else ""
    head = Text(" " * MARGIN + place + title(run), style="bold", no_wrap=True, overflow="ellipsis")
    state = Text(f"  {doing or status.state}", style=STYLES.get(status.state, "bold yellow"))
    done = ProgressBar(total=run.steps or 1, completed=run.step, width=max(10, min(40, width // 2)))
    whole = "" if run.steps is None else f" of {run.steps:,}"
    bar = Table.grid(padding=(0, 2, 0, 0))
    bar.add_row(" " * (MARGIN - 2), done, Text(f"step {run.step:,}{whole}", no_wrap=True))
    parts: list[RenderableType] = [head + state, bar, Text(_facts(run, width), no_wrap=True)]
    if run.predictors:
        parts += [Text(), _table(run, width)]
    return Group(*parts)


def _facts(run: RunStatus, width: int) -> str:
    """Return what is known besides, the most important first, as far as it fits into a line."""
    epochs = "" if run.epochs is None else f" of {run.epochs:g}"
    known = [
        f"epoch {run.epoch:.2f}{epochs}",
        run.remaining_seconds is not None and f"{clock(run.remaining_seconds)} left",
        run.images_per_second is not None and f"{run.images_per_second:,.0f} images/s",
        run.loss is not None and f"loss {run.loss:.4f}",
        run.memory_mb is not None and megabytes(1e6 * run.memory_mb),
        run.checkpoint is not None and f"checkpoint {run.checkpoint:,}",
    ]
    line = " " * MARGIN
    for fact in filter(None, known):
        joined = f"{line}  ·  {fact}" if line.strip() else f"{line}{fact}"
        line = joined if len(joined) <= width + MARGIN else line
    return line


def _table(run: RunStatus, width: int) -> Table:
    header, rows = columns(run)
    kept = fitting(header, rows, width)
    found = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    found.add_column(" " * MARGIN + header[0], no_wrap=True)
    for name in header[1:kept]:
        found.add_column(name, justify="right", no_wrap=True, style="bold" if name.endswith("last") else "")
    for row in rows:
        cells = [" " * MARGIN + row[0], *row[1:kept]]
        found.add_row(*cells, style="cyan" if row[0] == "ensemble" else None)
    return found
