"""Class names for a converted network: from a file, or those of a well-known data set."""

import json
import pathlib
import re
from collections import Counter
from typing import Any

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import read_bytes
from ekd_jax.common.records import MAX_BYTES


def read_class_names(path: pathlib.Path) -> tuple[str, ...]:
    """Read class names in the order of the classifier's outputs.

    Args:
        path: a text file with one name per line, or JSON: a list of names, `{"0": name, ...}`,
            `{"0": [identifier, name], ...}`, as ImageNet's index, or `{name: 0, ...}`.

    Raises:
        UserError: it cannot be read, or names are missing, empty or the same.
    """
    try:
        text = read_bytes(path, MAX_BYTES).decode("utf-8-sig")
        is_json = path.suffix == ".json" or text.lstrip()[:1] in ("[", "{")
        names = _of_json(json.loads(text)) if is_json else re.split(r"\r\n|\r|\n", text.rstrip("\r\n"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--class_names={path} cannot be read: {reason(error)}") from error
    names = [name.strip() for name in names]
    if "" in names:
        raise UserError(
            f"--class_names={path}: name {names.index('') + 1} is empty: give one name per class"
        )
    repeated = [name for name, number in Counter(names).items() if number > 1]
    if repeated:
        raise UserError(f"--class_names={path} has {repeated[0]!r} more than once: names must differ")
    return tuple(names)


def _of_json(found: Any) -> list[str]:
    """Return the names in a list or a dictionary.

    Raises:
        ValueError: it is something else, or the numbers of the classes are not 0, 1, 2, ...
    """
    if isinstance(found, dict) and all(type(number) is int for number in found.values()):
        found = {str(number): name for name, number in found.items()}
    if isinstance(found, dict):
        missing = [number for number in range(len(found)) if str(number) not in found]
        if missing:
            raise ValueError(f"it has {len(found)} entries, but none for class {missing[0]}")
        found = [found[str(number)] for number in range(len(found))]
    if not isinstance(found, list):
        raise ValueError("it must be a list of names, or an object that gives each class its name")
    # of ImageNet's [identifier, name] the identifier, because some of its names are the same
    names = [entry[0] if isinstance(entry, list) and entry else entry for entry in found]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("names must be strings")
    return names


def known_class_names(data: str) -> tuple[str, ...]:
    """Return the class names of a data set, or () if they are not known: nothing is prepared or downloaded."""
    from ekd_jax.data.opening import DIGITS
    from ekd_jax.data.registry import FROM_TFDS
    from ekd_jax.data.tfds.records import facts, published_facts

    if data == DIGITS.name:
        return DIGITS.class_names
    try:
        found = facts(data, "", False, "") or (published_facts(data) if data in FROM_TFDS else None)
    except UserError:  # it is no set of TFDS, or no set of images of classes
        return ()
    # the names of CIFAR are in its archive, and until it is prepared TFDS numbers its classes
    numbered = found and all(name.isdecimal() for name in found.class_names)
    return found.class_names if found and not numbered else ()
