"""TODO: models.members."""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from ekd_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Member:
    """A student as it is asked for.

    Attributes:
        network: a key of `models.MODELS`; "": the run's.
        width: multiplier of the compressed stages, or one of each stage.
    """

    network: str
    width: Fraction | tuple[Fraction, ...]

    @property
    def widths(self) -> tuple[Fraction, ...]:
        return self.width if isinstance(self.width, tuple) else (self.width,)

    def __str__(self) -> str:
        width = "-".join(f"{float(w):.4g}" for w in self.widths)
        return f"{self.network}:{width}" if self.network else width


def parse_students(value: Any) -> tuple[Member, ...]:
    """Students from `model.students`: a number S gives widths 1, (S-1)/S, ..., 1/S of the run's network.

    A tuple has one entry a student: a width multiplier (0.5); one of each stage ((1, 0.5, 0.5)); or the
    name of another network ("wrn_16_2"), with a width ("wrn_16_2:0.5") if it is not 1.

    Raises:
        UserError: not a positive number of students or a list of positive widths.
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
    return Member("", Fraction(str(entry)))  # by its decimal digits: 0.7 * 10 is 7


def parse_member(description: Mapping[str, Any]) -> Member:
    """The member that student.json's `architecture` is."""
    return Member(description["name"], tuple(Fraction(width) for width in description["widths"]))
