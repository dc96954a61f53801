"""A knob: one setting of a configuration, with its default, its meaning and the values it may have."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from ekd_jax.common.errors import UserError, nearest

LARGEST = 2**31 - 1  # integers are counted in 32 bits on devices


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which values a knob may have.

    Attributes:
        allowed: whether a value may be.
        must: what the rule demands; completes "config.x=1 must ...".
        choices: the values to choose from, looked up at each call, for knobs that are names.
    """

    allowed: Callable[[Any], bool]
    must: str = ""
    choices: Callable[[], tuple[str, ...]] | None = None


@dataclasses.dataclass(frozen=True)
class Knob:
    """A setting of a configuration.

    Attributes:
        default: its value in `default_config`; its type is the type of all values.
        meaning: one line that says what it does.
        rule: which values it may have.
        changes_result: whether another value changes what a run computes. Knobs that do not may differ
            when a run is resumed.
    """

    default: Any
    meaning: str
    rule: Rule = Rule(lambda value: True)
    changes_result: bool = True

    def check(self, path: str, value: Any) -> None:
        """Raise UserError, naming the knob `path`, if it may not have this value."""
        must, hint = _problem_of_numbers(value), ""
        if not must and self.rule.allowed(value):
            return
        must = must or self.rule.must
        if self.rule.choices and isinstance(value, str):
            choices = self.rule.choices()
            must = f"be one of {', '.join(choices)}"
            hint = nearest(value, choices)
        raise UserError(f"{path}={shown(value)} must {must}{hint if 'did you' in hint else ''}")


def shown(value: Any) -> str:
    """Return a value as it is shown in a message: a long one is cut."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _problem_of_numbers(value: Any) -> str:
    """Return what numbers in a value must be, "" if all are possible."""
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, float) and not math.isfinite(one):
            return "be a finite number"
        if isinstance(one, int) and abs(one) > LARGEST:
            return f"be at most {LARGEST:,}"
    return ""


def one_of(choices: Iterable[str] | Callable[[], Iterable[str]]) -> Rule:
    """Return the rule of a knob that is one of some names; a function is asked anew at every check."""
    look_up = choices if callable(choices) else lambda: choices
    return Rule(lambda value: value in look_up(), choices=lambda: tuple(look_up()))


def above(limit: float) -> Rule:
    """Return the rule of numbers above a limit."""
    return Rule(lambda value: value > limit, f"be above {limit:g}")


def between(low: float, high: float) -> Rule:
    """Return the rule of numbers from `low` to `high`."""
    return Rule(lambda value: low <= value <= high, f"be from {low:g} to {high:g}")


POSITIVE = above(0)
NOT_NEGATIVE = Rule(lambda value: value >= 0, "not be negative")
FRACTION = Rule(lambda value: 0 <= value < 1, "be at least 0 and below 1")
ALL_POSITIVE = Rule(lambda values: all(value > 0 for value in values), "be above 0")
INCREASING_FRACTIONS = Rule(
    lambda values: all(a < b for a, b in zip((0.0, *values), (*values, 1.0), strict=True)),
    "be increasing fractions between 0 and 1",
)
