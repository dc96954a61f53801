"""The space of a search: which knobs are tried, and which values each may have.

It is plain data, knob -> values: a list of choices, or a dict with `low` and `high` and, where wanted, `log` or `step`.
"""

import ast
import dataclasses
import math
import pathlib
import runpy
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from ekd_jax.common.errors import UserError, nearest, reason
from ekd_jax.common.knob import shown
from ekd_jax.config.knobs import KNOBS
from ekd_jax.config.resolve import flatten, resolve

FUNCTION = "get_space"
PARTS = ("low", "high", "log", "step")
DATA = ("data.name", "data.extra", "data.test_split", "data.corrupt", "data.validation_examples")
Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        low, high: both integers, or both floats.
        log: whether each factor is equally likely, not each difference.
        step: the distance between values; None for every float, or every integer.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def suggest(self, trial: Any, knob: str) -> Any:
        """Return the value that an Optuna trial has, or now draws, for the knob."""
        if isinstance(self.low, int):
            return trial.suggest_int(knob, self.low, self.high, log=self.log, step=self.step or 1)
        return trial.suggest_float(knob, self.low, self.high, log=self.log, step=self.step)

    def listed(self) -> list[Any]:
        """Return all values in order; none of a range that has no step, unless it is of integers."""
        step = self.step or (1 if isinstance(self.low, int) else 0)
        if not step:
            return []
        # Computed as Optuna does, so that both name the same floats.
        return [self.low + k * step for k in range(round((self.high - self.low) / step) + 1)]

    def stored(self, value: Any) -> Any:
        """Return a value as Optuna stores it."""
        return value

    def restored(self, stored: Any) -> Any:
        """Return the value that Optuna has stored."""
        return stored

    def as_json(self) -> Any:
        """Return the range as a space's file gives it."""
        kind = {"log": True} if self.log else {"step": self.step} if self.step else {}
        return {"low": self.low, "high": self.high, **kind}

    def __str__(self) -> str:
        kind = ", log" if self.log else f", step {self.step:g}" if self.step else ""
        return f"{self.low:g} to {self.high:g}{kind}"


@dataclasses.dataclass(frozen=True)
class Choices:
    """Values to choose from, without an order between them."""

    values: tuple[Any, ...]

    def suggest(self, trial: Any, knob: str) -> Any:
        """Return the value that an Optuna trial has, or now draws, for the knob."""
        return self.restored(trial.suggest_categorical(knob, [*map(self.stored, self.values)]))

    def listed(self) -> list[Any]:
        """Return all values in order."""
        return list(self.values)

    def stored(self, value: Any) -> Any:
        """Return a value as Optuna stores it: tuples are text there."""
        return repr(value) if isinstance(value, tuple) else value

    def restored(self, stored: Any) -> Any:
        """Return the value that Optuna has stored."""
        return next(value for value in self.values if self.stored(value) == stored)

    def as_json(self) -> Any:
        """Return the choices as a space's file gives them."""
        return [*self.values]

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


Space = dict[str, Range | Choices]


def read_space(given: str) -> Any:
    """Return what the function `get_space` of a file returns; text that begins with "{" is the space itself.

    Raises:
        UserError: there is no such file, it fails, or it has no such function.
    """
    if given.lstrip().startswith("{"):
        try:
            return ast.literal_eval(given.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise UserError(
                f"--space={given}: it must be a Python dict, as in {{'method.temperature': {{'low': 1, 'high': 6}}}}"
            ) from error
    path = pathlib.Path(given)
    if not path.is_file():
        others = sorted(str(p) for p in (path.parent.glob("*.py") if path.parent.is_dir() else ()))
        raise UserError(f"there is no file {path}{nearest(given, others) if others else ''}")
    try:
        function = runpy.run_path(str(path)).get(FUNCTION)
        if not callable(function):
            raise UserError(f"{path} is not a space: it has no function {FUNCTION}")
        return function()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename or path}, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # a user's file may raise anything
        raise UserError(f"{path} fails: {type(error).__name__}: {reason(error)}") from error


def check_space(asked: Any, config: FrozenConfigDict, overridden: Collection[str] = ()) -> Space:
    """Return the space that a file gives, with every value checked and of its knob's type.

    Args:
        asked: knob -> choices or range, as `read_space` returns it.
        config: the complete configuration whose knobs the values replace.
        overridden: dotted names of `config` that the command line set.

    Raises:
        UserError: a knob, bound or choice is not possible, or a knob is not one to search over.
    """
    if not isinstance(asked, Mapping | ConfigDict) or not asked:
        raise UserError(f"--space: {FUNCTION} must return a dict of knobs, with at least one")
    methods = _own_values(asked.get("method.name"))
    space: Space = {}
    for knob, values in asked.items():
        if not isinstance(knob, str):
            raise UserError(
                f"--space: {knob!r} must be the name of a knob, such as 'optimizer.learning_rate'"
            )
        _check_knob(knob, overridden)
        others: list[Values] = [{"method.name": name} for name in methods if knob != "method.name"]
        space[knob] = _checked(knob, values, config, overridden, others or [{}])
    return space


def with_values(
    config: FrozenConfigDict, values: Values, overridden: Collection[str] = ()
) -> FrozenConfigDict:
    """Return a configuration with some knobs replaced, complete and checked.

    As on the command line, another `method.name` takes its other knobs' defaults, but for those in `values` and
    `overridden`.

    Raises:
        UserError: a value is not possible, alone or with the others.
    """
    return resolve({**flatten(config), **values}, {*overridden, *values})


def _own_values(choices: Any) -> list[str]:
    return [name for name in choices if isinstance(name, str)] if isinstance(choices, list | tuple) else []


def _check_knob(knob: str, overridden: Collection[str]) -> None:
    """Raise UserError for a knob that a search must not choose."""
    if knob in ("seed", "seeds"):
        raise UserError(
            f"--space: {knob} is not one to search over: the best seed is luck; --config.seeds='(0,1,2)' gives every "
            f"trial several"
        )
    if knob in DATA:
        raise UserError(
            f"--space: {knob} chooses the images, and trials on other images cannot be compared: leave it out"
        )
    if knob in KNOBS and not KNOBS[knob].changes_result:
        raise UserError(f"--space: {knob} does not change the result: leave it out")
    if knob in overridden:
        raise UserError(f"{knob} is in --space and on the command line: leave one out")


def _checked(
    knob: str, asked: Any, config: FrozenConfigDict, overridden: Collection[str], others: list[Values]
) -> Range | Choices:
    """Return the values of one knob, checked together with each of `others`."""

    def typed(value: Any) -> Any:
        try:
            for other in others:
                found = flatten(with_values(config, {**other, knob: value}, overridden))[knob]
            return found
        except UserError as error:
            raise UserError(f"--space: {error}") from error

    if isinstance(asked, list | tuple):
        values = [typed(value) for value in asked]
        if len(set(values)) != len(asked):
            raise UserError(f"--space: {knob} has the same choice twice: {shown(asked)}")
        if len(values) < 2:
            raise UserError(
                f"--space: {knob} needs at least two choices; a fixed value is passed as --config.{knob}=VALUE"
            )
        return Choices(tuple(values))
    if not isinstance(asked, Mapping | ConfigDict):
        raise UserError(
            f"--space: {knob}={shown(asked)} must be a list of choices, or a range as in {{'low': 1, 'high': 6}}"
        )
    return _checked_range(knob, dict(asked), typed)


def _checked_range(knob: str, asked: Values, typed: Any) -> Range:
    for part in asked:
        if part not in PARTS:
            raise UserError(f"--space: {knob} has an unknown part {part!r}{nearest(str(part), PARTS)}")
    for part in ("low", "high"):
        if part not in asked:
            raise UserError(f"--space: {knob} has no {part!r}: a range is written {{'low': 1, 'high': 6}}")
    low, high = typed(asked["low"]), typed(asked["high"])
    if any(isinstance(bound, bool) or not isinstance(bound, int | float) for bound in (low, high)):
        raise UserError(
            f"--space: {knob} is not a number: give a list of choices, as in [{low!r}, {high!r}]"
        )
    if low >= high:
        raise UserError(f"--space: {knob}: low={low:g} must be below high={high:g}")
    typed(
        (low + high) // 2 if isinstance(low, int) else (low + high) / 2
    )  # -1 often stands for something else
    log, step = asked.get("log", False), asked.get("step")
    if not isinstance(log, bool):
        raise UserError(f"--space: {knob}: log={log!r} must be True or False")
    if log and low <= 0:
        raise UserError(f"--space: {knob}: low={low:g} must be above 0 with log=True")
    if log and step is not None:
        raise UserError(f"--space: {knob} has log and step: leave one out")
    if step is not None:
        _check_step(knob, low, high, step)
        step = type(low)(step)
    return Range(low, high, log, step)


def _check_step(knob: str, low: float, high: float, step: Any) -> None:
    kinds = int if isinstance(low, int) else int | float
    if isinstance(step, bool) or not isinstance(step, kinds) or not 0 < step <= high - low:
        kind = "a whole number" if kinds is int else "a number"
        raise UserError(f"--space: {knob}: step={step!r} must be {kind} above 0 and at most high - low")
    parts = (high - low) / step
    if not math.isclose(parts, round(parts), rel_tol=1e-9):
        raise UserError(f"--space: {knob}: step={step:g} must divide high - low = {high - low:g}")
