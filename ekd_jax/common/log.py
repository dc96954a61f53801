"""The logger of the package: library code logs lines, and whoever runs it decides where they go."""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TextIO

logger = logging.getLogger("ekd_jax")
_about: ContextVar[str] = ContextVar("about", default="")
_wiping: list[
    Callable[[], None]
] = []  # what a line that is logged must wipe from the terminal first; at most one


def wiped_before_lines(wipe: Callable[[], None] | None) -> None:
    """Say how to wipe what a terminal shows at its end, so that lines can be logged above it; None: nothing."""
    _wiping[:] = [wipe] if wipe else []


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Begin each line that is logged here with what it is about, while other threads log lines about something else."""
    token = _about.set(what)
    try:
        yield
    finally:
        _about.reset(token)


def _prefixed(record: logging.LogRecord) -> bool:
    if what := _about.get():
        record.msg = f"{what}: {record.msg}"
    return True


logger.addFilter(_prefixed)


def _wipe() -> None:
    for wipe in [*_wiping]:
        wipe()


@functools.cache
def once(level: int, line: str) -> None:
    """Log a line, unless this process has logged it before."""
    logger.log(level, line)


class _Stderr(logging.Handler):
    """Writes to the standard error stream of the moment, so that redirection works."""

    def emit(self, record: logging.LogRecord) -> None:
        _wipe()
        to_stderr(self.format(record) + "\n")


def to_stderr(text: str) -> None:
    """Write to standard error. A log on a full disk ends no run; a reader that has left, such as `head`, does."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BrokenPipeError:
        raise
    except OSError:
        pass


def renews_itself(stream: TextIO) -> bool:
    """Return whether lines on a stream can be written over: it is a terminal that is not dumb."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def on_terminal() -> bool:
    """Return whether the package's lines are shown on standard error, and can be written over there.

    They cannot while lines are about several things at a time.
    """
    shown_there = any(isinstance(handler, _Stderr) for handler in logger.handlers)
    return shown_there and not _about.get() and renews_itself(sys.stderr)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Show the package's lines on standard error, unless the program has given the logger handlers."""
    if logger.handlers:
        yield
        return
    handler, before = _Stderr(), (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a handler of the root logger would show every line again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
