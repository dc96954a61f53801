"""Data sets: facts that are known before an image is read, and examples by number."""

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ekd_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts about a data set that are known before any of its images is read.

    A source states them for the whole set; `ekd_jax.data.opening.facts` narrows them down to what a run on a
    configuration reads.

    Attributes:
        name: name of the set, as in the knob `data.name`.
        image_shape: H, W, C of the images. In a source, as stored, where H and W are None if they vary from
            image to image; for a run, as the network takes them.
        class_names: name of each class; a label is an index into them.
        train_examples: number of training examples.
        test_examples: number of test examples.
        validation_examples: number of training images that a run holds out; 0 in a source.
    """

    name: str
    image_shape: tuple[int | None, int | None, int]
    class_names: tuple[str, ...]
    train_examples: int
    test_examples: int
    validation_examples: int = 0

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """H, W, C of the network's input; known for a run, and for a source whose images have one size."""
        height, width, channels = self.image_shape
        assert height is not None, "images vary in size"
        assert width is not None, "images vary in size"
        return height, width, channels


@dataclasses.dataclass(frozen=True)
class Example:
    """One image as it is stored.

    Attributes:
        image: the bytes of an image file (JPEG, PNG, ...), or pixels (H, W, C) uint8.
        label: index of the class; not checked yet.
        name: name of the file or record, for messages.
    """

    image: bytes | np.ndarray
    label: int
    name: str


class Examples(Protocol):
    """Examples by number, in an order that is unrelated to their classes.

    They are read from several threads at once, and pickled for worker processes. A set that knows all labels
    without reading examples also has them as `labels`, (N,) integers.
    """

    def __len__(self) -> int:
        """Return the number of examples."""

    def __getitem__(self, index: int) -> Example:
        """Return the example with a number, counted from 0."""

    @property
    def fingerprint(self) -> str:
        """A text that differs if the examples differ; no image file is read for it.

        It is the identity of the data, so it stays the same when files are moved. Where pixels can change without
        it, as in files that are edited, a property `cache_key` differs then.
        """


def cache_key(examples: Examples) -> str:
    """Return the key of results that were computed from the pixels of examples."""
    key: str = getattr(examples, "cache_key", None) or examples.fingerprint
    return key


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that can be read."""

    facts: Facts
    train: Examples
    test: Examples

    @property
    def name(self) -> str:
        """The name of the set, as in the knob `data.name`."""
        return self.facts.name

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that differ if any example or class differs."""
        parts = (self.train.fingerprint, self.test.fingerprint, *self.facts.class_names)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_label(example: Example, facts: Facts) -> None:
    """Raise UserError unless the label of an example is the number of a class."""
    if not 0 <= example.label < facts.num_classes:
        raise UserError(
            f"the label of {example.name} is {example.label}, but {facts.name} has {facts.num_classes} "
            f"classes, counted from 0: prepare the set again, or correct it"
        )


class Subset:
    """Some of the examples of a set, given by their numbers (N,)."""

    def __init__(self, examples: Examples, numbers: np.ndarray):
        self.examples, self.numbers = examples, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        return self.examples[int(self.numbers[index])]

    @property
    def fingerprint(self) -> str:
        return f"{self.examples.fingerprint} {self._digest}"

    @property
    def cache_key(self) -> str:
        return f"{cache_key(self.examples)} {self._digest}"

    @property
    def _digest(self) -> str:
        return hashlib.sha256(self.numbers.astype(np.int64).tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Relabeled:
    """Examples of a set whose labels count in other class names.

    Attributes:
        examples: of the set.
        facts: of the set; they say which labels there are.
        new_labels: the new label of each class of the set.
    """

    examples: Examples
    facts: Facts
    new_labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        example = self.examples[index]
        check_label(example, self.facts)
        return dataclasses.replace(example, label=self.new_labels[example.label])

    @property
    def fingerprint(self) -> str:
        return f"{self.examples.fingerprint} {self.new_labels}"

    @property
    def cache_key(self) -> str:
        return f"{cache_key(self.examples)} {self.new_labels}"


class Joined:
    """The examples of several sets, one set after the other."""

    def __init__(self, parts: Sequence[Examples]):
        self.parts = tuple(parts)
        self._ends = tuple(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        part = bisect.bisect_right(self._ends, index)
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]

    @property
    def fingerprint(self) -> str:
        return " ".join(part.fingerprint for part in self.parts)

    @property
    def cache_key(self) -> str:
        return " ".join(map(cache_key, self.parts))
