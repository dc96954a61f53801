"""What a data set is: facts that are known before it is read, and examples by number."""

import dataclasses
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Info:
    """What is known of a data set before its images are read.

    Attributes:
        name: as in `data.name`.
        image_shape: H, W, C of the images as they are stored; H and W are None where they differ.
        class_names: one a class; a label is the place in it.
        train_examples: that may be trained on.
        test_examples: that results are measured on.
    """

    name: str
    image_shape: tuple[int | None, int | None, int]
    class_names: tuple[str, ...]
    train_examples: int
    test_examples: int


@dataclasses.dataclass(frozen=True)
class Example:
    """One image as it is stored.

    Attributes:
        image: a file's bytes (JPEG, PNG, ...), or pixels (H, W, C) uint8.
        label: a number, not checked yet.
        name: of the file or record, for messages.
    """

    image: bytes | np.ndarray
    label: int
    name: str


class Examples(Protocol):
    """Examples by number, in an order that has nothing to do with their classes.

    May be read from several threads at once, and pickled for worker processes.
    """

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int) -> Example:
        """Example number `index`, from 0."""

    @property
    def fingerprint(self) -> str:
        """Another one if the examples are others; nothing is read for it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that can be read."""

    info: Info
    train: Examples
    test: Examples
