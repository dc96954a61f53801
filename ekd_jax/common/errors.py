"""Errors that a user can mend."""

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """What is wrong, where, and what to do, in one line."""


def reason(error: BaseException) -> str:
    """What an exception says, in one line; of a long one the end, where the cause stands."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r" \[\w+='.*?'\]", "", text)  # what TensorStore appends
    return text if len(text) <= 160 else f"... {text[-160:]}"


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the choice nearest to `word`, else the list of all choices."""
    names = [str(choice) for choice in choices]

    def likeness(name: str) -> tuple[float, int]:  # of two alike names, the one with the nearer number
        ratio = difflib.SequenceMatcher(None, word, name).ratio()
        return ratio, -abs(_number(word) - _number(name))

    best = max(names, key=likeness)
    return (
        f"; did you mean {best!r}?" if likeness(best)[0] >= 0.5 else f"; choose one of {', '.join(names)}"
    )


def _number(word: str) -> int:
    return int("0" + "".join(filter(str.isdigit, word)))
