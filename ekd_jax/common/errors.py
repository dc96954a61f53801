"""Errors that a user can mend, and how they are put into one line."""

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator

from ekd_jax.common.text import printable

LONGEST = 160  # characters of another library's message
MOST_CHOICES = 40  # that a message lists
DISK_FULL = "the disk is full"
# What the system and TFDS say if nothing can be written; other libraries have it in the middle of long messages.
NOT_WRITTEN = {
    os.strerror(errno.ENOSPC): DISK_FULL,
    "Not enough disk space": DISK_FULL,
    os.strerror(errno.EDQUOT): "the disk quota is used up",
    os.strerror(errno.EFBIG): "a file would exceed the limit on file sizes",
    os.strerror(errno.EROFS): "the file system is read-only",
}


class UserError(Exception):
    """An error that the user can mend: one line with what is wrong, where, and what to do.

    Characters that cannot be printed, such as line breaks in the name of a file, are escaped.
    """

    def __init__(self, *messages: str):
        super().__init__(*map(printable, messages))


class Interrupted(Exception):  # noqa: N818  it is no error
    """A run was interrupted by a signal; everything is saved.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Begin the message of a `UserError` that is raised here with what it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def reason(error: BaseException) -> str:
    """Return an exception's message in one line; of a long one the end, where the cause stands."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and len(text) > LONGEST:
        return f"{error.strerror}: {str(error.filename)[:60]}..."
    text = re.sub(r" \[\w+='.*?'\]", "", text)  # what TensorStore appends
    if len(text) <= LONGEST:
        return text
    end = text[-LONGEST:]
    return f"... {end[end.find(' ') + 1 :]}"  # from the next word on


def not_written(error: BaseException) -> str:
    """Return what is wrong with the disk, "" if that is not what the error is about."""
    return next((why for said, why in NOT_WRITTEN.items() if said in str(error)), "")


def writing_failure(error: BaseException) -> str:
    """Return in one line why writing failed."""
    return not_written(error) or reason(error)


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` with the choice nearest to `word`; if none is near, a list of choices.

    Of many choices the list has the nearest ones.
    """
    names = [str(choice) for choice in choices]

    def likeness(name: str) -> tuple[float, int]:
        """Return how near a name is; between equal names the distance of their numbers decides."""
        ratio = difflib.SequenceMatcher(None, word, name).ratio()
        return ratio, -abs(_number(word) - _number(name))

    best = max(names, key=likeness)
    if likeness(best)[0] >= 0.5:
        return f"; did you mean {best!r}?"
    if len(names) <= MOST_CHOICES:
        return f"; choose one of {', '.join(names)}"
    nearby = sorted(names, key=likeness, reverse=True)[: MOST_CHOICES // 2]
    return f"; choose one of {', '.join(nearby)}, and {len(names) - len(nearby):,} more"


def _number(word: str) -> int:
    return int("0" + "".join(filter(str.isdecimal, word[:50])))
