"""The students of an ensemble as they are asked for: networks and widths."""

import dataclasses
import re
from fractions import Fraction
from typing import Any

from ekd_jax.common.errors import UserError

MAX_STUDENTS, MAX_WIDTH, MAX_STAGES = 100, 64, 100
NUMBER = r"\d+/\d+|(\d+\.?\d*|\.\d+)([eE][-+]?\d\d?)?"  # a fraction, or a decimal as Python prints it
MAX_DIGITS = 40


@dataclasses.dataclass(frozen=True)
class Member:
    """A student as it is asked for.

    Attributes:
        network: a key of `models.MODELS`; "" means the network of the run.
        width: the width multiplier of the compressed stages, or one for each stage.
    """

    network: str
    width: Fraction | tuple[Fraction, ...]

    @property
    def widths(self) -> tuple[Fraction, ...]:
        """The width as a tuple, of one or of one per stage."""
        return self.width if isinstance(self.width, tuple) else (self.width,)

    def __str__(self) -> str:
        width = "-".join(f"{float(w):.4g}" for w in self.widths)
        return f"{self.network}:{width}" if self.network else width


def parse_students(value: Any) -> tuple[Member, ...]:
    """Return the students that a value of `model.students` stands for.

    A number S stands for the widths 1, (S-1)/S, ..., 1/S of the run's network. A tuple has one entry per
    student: a width multiplier (0.5), a tuple of one per stage ((1, 0.5, 0.5)), or the name of another
    network ("wrn_16_2"), with a width ("wrn_16_2:0.5") if it is not 1.

    Raises:
        UserError: the value is neither a positive number of students nor a list of positive widths.
    """
    problem = (
        f"model.students={value!r} must be a number (5) or a tuple of width multipliers (1, 0.5) or "
        f"networks ('resnet20', 'wrn_16_2:0.5')"
    )
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= MAX_STUDENTS:
            raise UserError(f"{problem}, 1 to {MAX_STUDENTS} of them")
        return tuple(Member("", Fraction(value - j, value)) for j in range(value))
    if not isinstance(value, list | tuple) or not value:
        raise UserError(problem)
    if len(value) > MAX_STUDENTS:
        raise UserError(f"model.students has {len(value)} entries: at most {MAX_STUDENTS} are possible")
    try:
        return tuple(_member(entry) for entry in value)
    except ValueError as error:
        raise UserError(f"{problem}: {error}") from None


def _member(entry: Any) -> Member:
    if isinstance(entry, list | tuple):
        if not 1 <= len(entry) <= MAX_STAGES:
            raise ValueError(f"a student has 1 to {MAX_STAGES} widths, not {len(entry)}")
        return Member("", tuple(map(parse_width, entry)))
    if isinstance(entry, str) and entry[:1].isalpha():
        name, colon, width = entry.partition(":")
        return Member(name, parse_width(width) if colon else Fraction(1))
    return Member("", parse_width(entry))


def parse_width(value: Any) -> Fraction:
    """Return a width multiplier, exactly: 0.7 is 7/10, and "2/3" stays that.

    Raises:
        ValueError: it is not a number above 0 and at most MAX_WIDTH; the message says so.
    """
    text = str(value)
    if re.fullmatch(NUMBER, text, re.ASCII) and len(text) <= MAX_DIGITS:
        try:
            width = Fraction(text)
        except ZeroDivisionError:
            width = Fraction(0)
        if 0 < width <= MAX_WIDTH:
            return width
    raise ValueError(f"width {text[:MAX_DIGITS]!r} is not a number above 0 and at most {MAX_WIDTH}")
