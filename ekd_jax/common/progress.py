"""Progress and remaining time of long tasks."""

import re
import shutil
import time
from collections.abc import Callable

from ekd_jax.common.log import logger, on_terminal, to_stderr, wiped_before_lines
from ekd_jax.common.text import clock, megabytes

TERMINAL_SECONDS, LOG_SECONDS = 0.5, 60.0  # least time between two updates


TABLE_SECONDS = 0.25  # the same for a table
STYLE = re.compile("\x1b\\[[0-9;]*m")


class Block:
    """Lines at the end of a terminal that are written over; the cursor stays below them, and is never hidden.

    Args:
        write: writes to the terminal at once.
    """

    def __init__(self, write: Callable[[str], None]):
        self._write = write
        self._lines: list[str] = []

    def show(self, text: str) -> None:
        """Show a text in place of the one before; its lines should fit into the terminal."""
        before, self._lines = self._rows(), text.split("\n")
        shown = "".join(f"{line}\x1b[K\n" for line in self._lines)
        self._write(f"{before}{shown}\x1b[J")

    def clear(self) -> None:
        """Wipe the text."""
        if self._lines:
            before, self._lines = self._rows(), []
            self._write(f"{before}\x1b[J")

    def _rows(self) -> str:
        """Return what moves the cursor to the first line; lines of a terminal made narrower meanwhile are wrapped."""
        width = max(1, shutil.get_terminal_size().columns)
        rows = sum(max(1, -(-len(STYLE.sub("", line)) // width)) for line in self._lines)
        return f"\x1b[{rows}F" if rows else ""


class Progress:
    """Reports how much of a task is done and how long the rest will take.

    On a terminal it is one line that renews itself, or a table if the task has one. Elsewhere, in a log file, a
    notebook or a dumb terminal, it is a plain line once a minute, and none while the task itself logs lines more
    often.

    Args:
        task: what is done; the line begins with it.
        total: amount of work.
        done: amount that was done before.
        unit: what is counted; "bytes" are shown in MB.
        table: (this progress, what is done, columns, lines) -> the table that a terminal shows instead of a line.
    """

    def __init__(
        self,
        task: str,
        total: int,
        done: int = 0,
        unit: str = "steps",
        table: "Callable[[Progress, str, int, int], str] | None" = None,
    ):
        self.task, self.total, self.done, self.unit = task, total, done, unit
        self._terminal = on_terminal()
        self._width = 0  # of the line that renews itself
        self._table, self._block = table, Block(to_stderr)
        self._next_update = time.monotonic() + (TERMINAL_SECONDS if self._terminal else LOG_SECONDS)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Estimate the speed and the remaining time from now on."""
        self._started, self._done_before = time.monotonic(), self.done

    def remaining(self) -> str:
        """Return the remaining time at the speed so far, as h:mm:ss."""
        return clock(self.seconds_left())

    @property
    def moves(self) -> bool:
        """Whether anything was done since the clock was started."""
        return self.done > self._done_before

    def seconds_left(self) -> float:
        """Return the remaining seconds at the speed so far."""
        newly_done = self.done - self._done_before
        return (time.monotonic() - self._started) / max(newly_done, 1) * (self.total - self.done)

    def add(self, amount: int) -> None:
        """Count an amount as done; cheap enough to be called for every item."""
        self.done += amount
        if time.monotonic() >= self._next_update:
            self._update("")

    def update(self, done: int, text: str) -> None:
        """Set the amount that is done, and say what is going on; a terminal shows it at once."""
        at_once = self._terminal and not (self._table and done > self.done)
        self.done = done
        if at_once or time.monotonic() >= self._next_update:
            self._update(text)

    def record(self, text: str) -> None:
        """Log a line with what the table shows, where there is no table."""
        if not (self._terminal and self._table):
            self.line(text)

    def line(self, text: str) -> None:
        """Log a line that stays."""
        self.clear()
        logger.info(text)
        self._next_update = time.monotonic() + (0.0 if self._terminal else LOG_SECONDS)

    def clear(self) -> None:
        """Wipe the line or the table that renews itself."""
        wiped_before_lines(None)
        self._block.clear()
        if self._width:
            to_stderr("\r" + " " * self._width + "\r")
            self._width = 0

    def finish(self) -> None:
        """Log the final count, as a line that stays."""
        self.line(self._count())

    def _update(self, text: str) -> None:
        now, newly_done = time.monotonic(), self.done - self._done_before
        if not text and newly_done:
            text = f"{self._amount(newly_done / max(now - self._started, 1e-9))} a second"
        left = f"{self.remaining()} left" if newly_done else ""
        line = ", ".join(filter(None, (self._count(), text, left)))
        if not self._terminal:
            self.line(line)
            return
        wiped_before_lines(self.clear)
        if self._table:
            columns, lines = shutil.get_terminal_size()
            self._block.show(self._table(self, text, columns, lines))
            self._next_update = now + TABLE_SECONDS
            return
        line = line[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be renewed
        to_stderr("\r" + line.ljust(self._width))
        self._width = len(line)
        self._next_update = now + TERMINAL_SECONDS

    def _count(self) -> str:
        done = self._amount(self.done).removesuffix(f" {self.unit}")
        return f"{self.task}: {done} of {self._amount(self.total)}"

    def _amount(self, value: float) -> str:
        return megabytes(value) if self.unit == "bytes" else f"{value:,.0f} {self.unit}"
