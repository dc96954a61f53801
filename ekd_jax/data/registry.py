"""Names of data sets: the package's own, and those that users register."""

import dataclasses
import re
from collections.abc import Callable

from ekd_jax.common.errors import UserError, reason
from ekd_jax.data.arrays import ARRAYS
from ekd_jax.data.dataset import Source

# Sets that `data.name` knows without asking TFDS, which takes half a second to import.
BUILT_IN = ("digits", "folder")
FROM_TFDS = ("cifar10", "cifar100", "svhn_cropped", "mnist", "fashion_mnist", "kmnist", "imagenet2012")

_loaders: dict[str, Callable[[], Source]] = {}
_loaded: dict[str, Source] = {}


def register_dataset(name: str, load: Callable[[], Source]) -> None:
    """Register a data set, so that `data.name=<name>` works in configurations and on the command line.

    Call it in a module that the knob `imports` names:

        ekd_jax.data.register_dataset("shapes", lambda: ekd_jax.data.from_arrays(...))

    Args:
        name: letters, digits, "_", "-" and "."; not the name of another set.
        load: returns the set; called once per process, when the set is needed. Every process of a run must get
            the same examples in the same order.

    Raises:
        UserError: the name is taken or not a valid one.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(
            f'the name {name!r} of a data set must consist of letters, digits, "_", "-" and "."'
        )
    if name in (ARRAYS, *list_datasets()):
        raise UserError(f"there is a data set named {name!r} already: register yours by another name")
    _loaders[name] = load


def list_datasets() -> list[str]:
    """Return the names that `data.name` knows; further image classification sets of TFDS work, too."""
    return [*BUILT_IN, *FROM_TFDS, *_loaders]


def is_registered(name: str) -> bool:
    """Return whether a user registered a set by this name."""
    return name in _loaders


def load_registered(name: str) -> Source:
    """Return a set that a user registered, loaded once.

    Raises:
        UserError: it cannot be loaded, or is not a `Source` whose facts and examples agree.
    """
    if name not in _loaded:
        _loaded[name] = _load(name)
    return _loaded[name]


def _load(name: str) -> Source:
    try:
        source = _loaders[name]()
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"loading the registered data set {name} failed: {reason(error)}") from error
    if not isinstance(source, Source):
        raise UserError(
            f"the registered data set {name}: its function must return an ekd_jax.data.Source, as "
            f"ekd_jax.data.from_arrays does, not {type(source).__name__}"
        )
    for split, stated, found in (
        ("train", source.facts.train_examples, len(source.train)),
        ("test", source.facts.test_examples, len(source.test)),
    ):
        if stated != found or not found:
            raise UserError(
                f"the registered data set {name} states {stated:,} {split} examples and has {found:,}: "
                f"there must be some, and facts.{split}_examples must be their number"
            )
    return dataclasses.replace(source, facts=dataclasses.replace(source.facts, name=name))
