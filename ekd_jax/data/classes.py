"""Matching of classes by name: a label is only a position in the class names of whoever wrote it."""

from collections.abc import Sequence

from ekd_jax.common.errors import UserError, nearest

NAMES_SHOWN = 5  # how many names an error lists; the others are counted


def label_map(names: Sequence[str], among: Sequence[str], whose: str, others: str) -> tuple[int, ...]:
    """Return the position in `among` of each of `names`.

    Args:
        names: class names.
        among: class names that include all of them, in any order.
        whose: the owner of `names`, for the error: "the data set folder".
        others: the owner of `among`: "the student".

    Raises:
        UserError: a name is not in `among`.
    """
    positions = {name: position for position, name in enumerate(among)}
    unknown = [name for name in names if name not in positions]
    if unknown:
        raise UserError(
            f"{whose} has the {_classes(unknown)} that {others} does not have{_advice(unknown, among)}"
        )
    return tuple(positions[name] for name in names)


def check_same_classes(names: Sequence[str], among: Sequence[str], whose: str, others: str) -> None:
    """Raise UserError unless both have the same class names, in any order; for the arguments see `label_map`."""
    label_map(names, among, whose, others)
    label_map(among, names, others, whose)


def listed(names: Sequence[str]) -> str:
    """Return the first of some class names as text, and the number of the others."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:NAMES_SHOWN])) + more


def _classes(names: Sequence[str]) -> str:
    return f"{'class' if len(names) == 1 else 'classes'} {listed(names)}"


def _advice(unknown: Sequence[str], among: Sequence[str]) -> str:
    """Return the class that is nearest to the first unknown one, and what to do."""
    if list(among) == [str(number) for number in range(len(among))]:
        return f", whose classes are only numbered, 0 to {len(among) - 1}: give it the names of the classes"
    hint = nearest(unknown[0], among)
    if "did you mean" not in hint:
        hint = f"; its classes are {listed(among)}"
    return f"{hint}: classes are matched by name, so rename them or take other data"
