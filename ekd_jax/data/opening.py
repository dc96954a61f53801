"""Which data set a configuration names, and which of its examples a run reads.

A set is the embedded digits, a directory of class directories, arrays in memory, a set that the user
registered, or any image classification set of TFDS. A run reads training examples, examples held out for
validation, and test examples.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import FrozenConfigDict

from ekd_jax.common.cache import Cache
from ekd_jax.common.errors import UserError
from ekd_jax.common.log import logger
from ekd_jax.common.progress import Progress
from ekd_jax.data import folder, order, registry
from ekd_jax.data.arrays import ARRAYS, ArrayExamples
from ekd_jax.data.classes import label_map
from ekd_jax.data.dataset import (
    Examples,
    Facts,
    Joined,
    Relabeled,
    Source,
    Subset,
    cache_key,
    check_label,
)
from ekd_jax.data.decode import CorruptImageError, Reader

DIGITS = Facts(
    "digits", (8, 8, 1), tuple("zero one two three four five six seven eight nine".split()), 899, 898
)
CORRUPT = Cache("corrupt")


@dataclasses.dataclass(frozen=True)
class Data:
    """The examples of a run, and the reader that turns them into pixels.

    Attributes:
        facts: what the run reads.
        train: examples to train on.
        validation: examples held out for validation, or None.
        test: examples to test on.
        reader: decodes and resizes an example.
    """

    facts: Facts
    train: Examples
    validation: Examples | None
    test: Examples
    reader: Reader

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that differ if any example, its split or its class differs."""
        held_out = "" if self.validation is None else self.validation.fingerprint
        parts = (self.train.fingerprint, held_out, self.test.fingerprint, *self.facts.class_names)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def to_evaluate(self, split: str) -> "Data":
        """Return the data with another split to test on.

        Args:
            split: "test", "validation", "train", or "all" for all of these together.

        Raises:
            UserError: no images are held out for validation.
        """
        if split == "validation" and self.validation is None:
            raise UserError("--split=validation: no images were held out (data.validation_examples=0)")
        held_out = [self.validation] if self.validation is not None else []
        chosen = {"test": [self.test], "train": [self.train], "validation": held_out}
        parts = chosen.get(split, [self.train, *held_out, self.test])
        examples = parts[0] if len(parts) == 1 else Joined(parts)
        facts = dataclasses.replace(self.facts, test_examples=len(examples))
        return dataclasses.replace(self, facts=facts, test=examples)

    def with_input(self, shape: tuple[int, int, int]) -> "Data":
        """Return the data with images of another shape (H, W, C); color is converted where images are decoded."""
        facts = dataclasses.replace(self.facts, image_shape=shape)
        return dataclasses.replace(self, facts=facts, reader=dataclasses.replace(self.reader, shape=shape))

    def with_classes(self, class_names: Sequence[str], owner: str) -> "Data":
        """Return the data with labels that count in other class names, which are matched by name.

        Args:
            class_names: every class of the data, and perhaps more, in any order.
            owner: whose class names these are, for the error.

        Raises:
            UserError: the data has a class that is not among them.
        """
        names = tuple(class_names)
        if names == self.facts.class_names:
            return self
        labels = label_map(self.facts.class_names, names, f"the data set {self.facts.name}", owner)

        def relabeled(examples: Examples) -> Examples:
            return Relabeled(examples, self.facts, labels)

        return dataclasses.replace(
            self,
            facts=dataclasses.replace(self.facts, class_names=names),
            train=relabeled(self.train),
            validation=None if self.validation is None else relabeled(self.validation),
            test=relabeled(self.test),
        )


def facts(config: FrozenConfigDict, source: Source | None = None) -> Facts | None:
    """Return what a run on `config` will read, or None for a set that has to be prepared first.

    No image file is read and nothing is prepared.

    Args:
        config: resolved configuration.
        source: the set itself, where it was passed from Python instead of being found by its name.

    Raises:
        UserError: the configuration asks for something that the set does not have.
    """
    _check_test_split(config.data, source)
    found = _facts_of_source(config.data, source)
    return _facts_of_run(config.data, found) if found else None


def known_facts(config: FrozenConfigDict, source: Source | None = None) -> Facts:
    """Return what a run on `config` will read, like `facts`.

    Raises:
        UserError: also if the set has to be prepared first.
    """
    known = facts(config, source)
    if known is None:
        raise UserError(
            f"{config.data.name} is not prepared in data.data_dir={config.data.data_dir!r}, so nothing is "
            f"known about it: prepare it first with python -m ekd_jax.prepare --config=..."
        )
    return known


def open_data(config: FrozenConfigDict, source: Source | None = None) -> Data:
    """Open the data set that `config.data` names, and prepare it first if necessary.

    No image is read, except with data.corrupt=skip: then each one is decoded once to find those to leave out.

    Args:
        config: resolved configuration.
        source: the set itself, where it was passed from Python instead of being found by its name.

    Raises:
        UserError: the set is missing and cannot be obtained, its archive is damaged, or the configuration
            asks for something that the set does not have.
    """
    section = config.data
    _check_test_split(section, source)
    source = _open_source(section, source)
    known = _facts_of_run(section, source.facts)
    reader = Reader(known.input_shape, section.fit, section.max_pixels)
    train, test = source.train, source.test
    if section.corrupt == "skip":
        train, test = (without_corrupt(examples, reader) for examples in (train, test))
        for split, examples in (("training", train), ("test", test)):
            if not len(examples):
                raise UserError(f"none of the {split} images of {source.name} can be read: replace them")
        left = dataclasses.replace(source.facts, train_examples=len(train), test_examples=len(test))
        known = _facts_of_run(section, left)
    validation = None
    if known.validation_examples:
        shuffled = order.holdout_order(len(train))
        kept, held_out = np.split(shuffled, [len(train) - known.validation_examples])
        train, validation = Subset(train, np.sort(kept)), Subset(train, np.sort(held_out))
    if known.train_examples < len(train):
        train = Subset(train, np.arange(known.train_examples))
    return Data(known, train, validation, test, reader)


def _check_test_split(section: FrozenConfigDict, source: Source | None) -> None:
    """Raise UserError if the configuration chooses a split of a set that has no others."""
    named = section.name in ("digits", ARRAYS) or registry.is_registered(section.name)
    if section.test_split and (named or source is not None):
        raise UserError(
            f"data.test_split={section.test_split}: {section.name} has one set of test images, and no splits to "
            f"choose from: leave it empty"
        )


def _facts_of_source(section: FrozenConfigDict, source: Source | None) -> Facts | None:
    """Return the facts about the whole set that `data` names; None if it has to be prepared first."""
    if source is not None or section.name == ARRAYS or registry.is_registered(section.name):
        return _open_source(section, source).facts
    if section.name == "digits":
        return DIGITS
    if section.name == "folder":
        return folder.list_folder(section.data_dir, section.test_split).facts
    from ekd_jax.data.tfds import records  # TFDS takes half a second to import

    name, extra, test_split = section.name, section.extra, section.test_split
    return records.facts(name, section.data_dir, extra, test_split) or records.published_facts(
        name, extra, test_split
    )


def _open_source(section: FrozenConfigDict, source: Source | None) -> Source:
    """Return the set that `data` names, prepared if necessary, or the one that was passed."""
    if source is not None:
        if section.name != source.name:
            raise UserError(
                f"data.name={section.name}, but the set that was passed is named {source.name}: "
                f"set config.data.name to that"
            )
        return source
    if section.name == "digits":
        return _digits()
    if section.name == "folder":
        return folder.open_folder(section.data_dir, section.test_split)
    if registry.is_registered(section.name):
        return registry.load_registered(section.name)
    if section.name == ARRAYS:
        raise UserError(
            "data.name=arrays: this run was trained on arrays that were passed in Python: pass data=..., or "
            "register the set with ekd_jax.data.register_dataset and name its module in imports"
        )
    from ekd_jax.data.tfds import records

    return records.open_set(
        section.name, section.data_dir, section.manual_dir, section.extra, section.test_split
    )


def _digits() -> Source:
    """Return the UCI handwritten digits (digits.LICENSE): even images for training, odd ones for testing."""
    with np.load(pathlib.Path(__file__).with_name("digits.npz")) as file:
        images = np.round(file["images"][..., None] * (255 / 16)).astype(np.uint8)
        labels = file["labels"].astype(np.int32)
    train, test = (
        ArrayExamples(images[i::2], labels[i::2], f"digits {split}")
        for i, split in enumerate(("train", "test"))
    )
    return Source(DIGITS, train, test)


def _facts_of_run(section: FrozenConfigDict, stored: Facts) -> Facts:
    """Return what a run with this section `data` reads from a set.

    Raises:
        UserError: the section asks for something that the set does not have.
    """
    if stored.num_classes < 2:
        raise UserError(
            f"{stored.name} has one class alone ({', '.join(stored.class_names)}), so there is nothing to tell "
            f"apart: two or more are needed"
        )
    if section.extra and stored.name != "svhn_cropped":
        raise UserError(f"data.extra=True: {stored.name} has no extra images; svhn_cropped does")
    channels = stored.image_shape[2]
    for knob, values in (("mean", section.mean), ("std", section.std)):
        if len(values) not in (1, channels):
            raise UserError(f"data.{knob}={values} must have one value or {channels}, one per channel")
    return dataclasses.replace(
        stored,
        image_shape=_input_shape(section, stored),
        train_examples=_number_to_train_on(section, stored),
        validation_examples=section.validation_examples,
    )


def _number_to_train_on(section: FrozenConfigDict, stored: Facts) -> int:
    remaining = stored.train_examples - section.validation_examples
    if remaining < 1:
        raise UserError(
            f"data.validation_examples={section.validation_examples} leaves nothing to train on: "
            f"{stored.name} has {stored.train_examples} training examples"
        )
    if section.train_examples > remaining:
        raise UserError(
            f"data.train_examples={section.train_examples}: {stored.name} has {remaining} training examples"
            + (" besides those for validation" if section.validation_examples else "")
        )
    return section.train_examples or remaining


def _input_shape(section: FrozenConfigDict, stored: Facts) -> tuple[int, int, int]:
    """Return H, W, C of the network's input."""
    height, width, channels = stored.image_shape
    size: int = section.image_size
    if not size and (height is None or width is None):
        raise UserError(
            f"images of {stored.name} may differ in size: choose the size of the network's input, for example "
            f"--config.data.image_size=224 --config.data.fit=crop (or stretch)"
        )
    if size and section.fit == "native" and (height or size, width or size) != (size, size):
        raise UserError(
            f"data.image_size={size}: images of {stored.name} are {height}x{width}; "
            f"pass --config.data.fit=stretch or crop to change their size"
        )
    return (size, size, channels) if size else stored.input_shape


def read_example(
    examples: Examples, reader: Reader, facts: Facts, number: int, draws: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """Return pixels (H, W, C) uint8 and label of an example.

    Args:
        examples: the set that it belongs to.
        reader: decodes and resizes it.
        facts: of the set; they say which labels there are.
        number: its number in the set.
        draws: random numbers of a crop, as for `Reader`.

    Raises:
        UserError: the image cannot be read, or the label is out of range.
    """
    example = examples[number]
    check_label(example, facts)
    return reader(example, draws), example.label


def without_corrupt(examples: Examples, reader: Reader) -> Examples:
    """Return the examples that can be read, and log which ones cannot; the cache remembers them."""
    key = f"{cache_key(examples)} {reader}"
    found = CORRUPT.load(key)
    if found is None:
        found = _find_corrupt(examples, reader)
        CORRUPT.store(key, found)
    for why in found["reasons"]:
        logger.info(f"left out: {why}")
    corrupt = found["numbers"]
    if not len(corrupt):
        return examples
    logger.warning(f"left out {len(corrupt)} of {len(examples):,} images, which cannot be read")
    return Subset(examples, np.setdiff1d(np.arange(len(examples)), corrupt))


def _find_corrupt(examples: Examples, reader: Reader) -> dict[str, np.ndarray]:
    """Return the numbers of the examples that cannot be read (N,) int64, and the reasons (N,) text."""

    def reason_not_to_read(number: int) -> str:
        try:
            reader(examples[number])
        except CorruptImageError as error:
            return error.why
        return ""

    progress = Progress("looking for images that cannot be read", len(examples), unit="images")
    reasons = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for why in threads.map(reason_not_to_read, range(len(examples))):
            reasons.append(why)
            progress.add(1)
    progress.finish()
    numbers = np.array([number for number, why in enumerate(reasons) if why], np.int64)
    return {"numbers": numbers, "reasons": np.array([why for why in reasons if why], np.str_)}
