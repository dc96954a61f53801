"""TODO: common.progress."""

import sys
import time
from typing import TextIO

from ekd_jax.common.text import clock, megabytes


class Progress:
    """Steps done, speed and time left: a line that renews itself on a terminal, none elsewhere.

    Args:
        total: steps of the run.
        start: step it goes on from.
        stream: where to; standard error if not given.
    """

    def __init__(self, total: int, start: int, stream: TextIO | None = None):
        self.total, self.start, self.stream = total, start, stream or sys.stderr
        self._width = 0
        self.begin()

    def begin(self) -> None:
        """The time left is reckoned from now on."""
        self._began = time.monotonic()

    def remaining(self, step: int) -> str:
        """Time left at the speed so far, as h:mm:ss."""
        done = step - self.start
        seconds = (time.monotonic() - self._began) / max(done, 1) * (self.total - step)
        return clock(seconds)

    def update(self, step: int, text: str) -> None:
        if self.stream.isatty():
            left = f"  {self.remaining(step)} left" if step > self.start else ""
            line = f"step {step:,}/{self.total:,}  {text}{left}"
            self.stream.write("\r" + line.ljust(self._width))
            self.stream.flush()
            self._width = len(line)

    def line(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        self.stream.write(text + "\n")
        self.stream.flush()

    def clear(self) -> None:
        """Wipes the line that renews itself."""
        if self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self.stream.flush()
            self._width = 0


class TaskProgress:
    """How much of some work is done: a line that renews itself on a terminal, one a minute elsewhere.

    Args:
        what: is done.
        total: how much there is.
        start: how much was done before.
        unit: what is counted; "bytes" are shown as MB.
    """

    def __init__(self, what: str, total: int, start: int, unit: str):
        self.what, self.total, self.start, self.unit = what, total, start, unit
        self.done, self.began = start, time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.next = self.began + 1

    def add(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if now >= self.next:
            self.next = now + (0.5 if self.terminal else 60)
            speed = max(self.done - self.start, 1) / (now - self.began)
            left = clock((self.total - self.done) / speed)
            self._write(f"{self._count()}, {self._amount(speed)} a second, {left} left")

    def end(self) -> None:
        self._write(self._count(), "\n" if self.terminal else "")

    def _count(self) -> str:
        done = self._amount(self.done).removesuffix(f" {self.unit}")
        return f"{self.what}: {done} of {self._amount(self.total)}"

    def _amount(self, value: float) -> str:
        return megabytes(value) if self.unit == "bytes" else f"{value:,.0f} {self.unit}"

    def _write(self, text: str, after: str = "") -> None:
        line = f"\r{text:<100}" if self.terminal else f"{text}\n"
        sys.stderr.write(line + after)
        sys.stderr.flush()
