"""Progress and remaining time of long tasks."""

import shutil
import time

from ekd_jax.common.log import logger, on_terminal, to_stderr
from ekd_jax.common.text import clock, megabytes

TERMINAL_SECONDS, LOG_SECONDS = 0.5, 60.0  # least time between two updates


class Progress:
    """Reports how much of a task is done and how long the rest will take.

    On a terminal it is one line that renews itself. Elsewhere, in a log file or a notebook, it is a plain line
    once a minute, and none while the task itself logs lines more often.

    Args:
        task: what is done; the line begins with it.
        total: amount of work.
        done: amount that was done before.
        unit: what is counted; "bytes" are shown in MB.
    """

    def __init__(self, task: str, total: int, done: int = 0, unit: str = "steps"):
        self.task, self.total, self.done, self.unit = task, total, done, unit
        self._terminal = on_terminal()
        self._width = 0  # of the line that renews itself
        self._next_update = time.monotonic() + (TERMINAL_SECONDS if self._terminal else LOG_SECONDS)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Estimate the speed and the remaining time from now on."""
        self._started, self._done_before = time.monotonic(), self.done

    def remaining(self) -> str:
        """Return the remaining time at the speed so far, as h:mm:ss."""
        newly_done = self.done - self._done_before
        seconds = (time.monotonic() - self._started) / max(newly_done, 1) * (self.total - self.done)
        return clock(seconds)

    def add(self, amount: int) -> None:
        """Count an amount as done; cheap enough to be called for every item."""
        self.done += amount
        if time.monotonic() >= self._next_update:
            self._update("")

    def update(self, done: int, text: str) -> None:
        """Set the amount that is done, and say what is going on; a terminal shows it at once."""
        self.done = done
        if self._terminal or time.monotonic() >= self._next_update:
            self._update(text)

    def line(self, text: str) -> None:
        """Log a line that stays."""
        self.clear()
        logger.info(text)
        self._next_update = time.monotonic() + (0.0 if self._terminal else LOG_SECONDS)

    def clear(self) -> None:
        """Wipe the line that renews itself."""
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
        line = line[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be renewed
        to_stderr("\r" + line.ljust(self._width))
        self._width = len(line)
        self._next_update = now + TERMINAL_SECONDS

    def _count(self) -> str:
        done = self._amount(self.done).removesuffix(f" {self.unit}")
        return f"{self.task}: {done} of {self._amount(self.total)}"

    def _amount(self, value: float) -> str:
        return megabytes(value) if self.unit == "bytes" else f"{value:,.0f} {self.unit}"
