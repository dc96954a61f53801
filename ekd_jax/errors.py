"""Errors that a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What is wrong, where, and what to do, in one line."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the choice nearest to `word`, else the list of all choices."""
    names = [str(c) for c in choices]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; choose one of {', '.join(names)}"
