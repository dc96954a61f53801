"""The students of an ensemble as they are asked for: networks and widths."""

import dataclasses
from fractions import Fraction
from typing import Any

from ekd_jax.common.errors import UserError


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
        if value < 1:
            raise UserError(f"{problem}, at least one")
        return tuple(Member("", Fraction(value - j, value)) for j in range(value))
    if not isinstance(value, list | tuple) or not value:
        raise UserError(problem)
    try:
        members = tuple(_member(entry) for entry in value)
    except ValueError:
        raise UserError(problem) from None
    if any(width <= 0 for member in members for width in member.widths):
        raise UserError(f"{problem}, each above 0")
    return members


def _member(entry: Any) -> Member:
    if isinstance(entry, list | tuple):
        return Member("", tuple(Fraction(str(width)) for width in entry))
    if isinstance(entry, str) and entry[:1].isalpha():
        name, _, width = entry.partition(":")
        return Member(name, Fraction(width or "1"))
    return Member("", Fraction(str(entry)))  # exact decimals: 0.7 * 10 is 7
