"""Which data set a configuration names, and which of its examples a run reads.

The embedded digits, a folder of class folders, or any image classification set of TFDS; training
examples, those held out for validation, and those to test on.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np

from ekd_jax.common.errors import UserError
from ekd_jax.common.files import user_cache, write_json
from ekd_jax.common.progress import TaskProgress
from ekd_jax.data import folder, order
from ekd_jax.data.dataset import Example, Examples, Info, Source
from ekd_jax.data.decode import CorruptImageError, Reader

DIGITS = Info(
    "digits", (8, 8, 1), tuple("zero one two three four five six seven eight nine".split()), 899, 898
)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a run on a configuration reads, known before any image is.

    Attributes:
        input_shape: H, W, C of what the network takes.
    """

    name: str
    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    train_examples: int
    validation_examples: int
    test_examples: int

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class Data:
    """The examples of a run, and what makes pixels of them.

    Attributes:
        validation: None if nothing is held out.
    """

    facts: Facts
    train: Examples
    validation: Examples | None
    test: Examples
    reader: Reader


class Pixels:
    """Examples in memory.

    Args:
        images: (N, H, W, C) uint8.
        labels: (N,) integers.
        name: of the set, for messages.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, name: str):
        self._images, self._labels, self._name = images, labels, name

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]), f"{self._name}[{index}]")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._images.tobytes() + self._labels.tobytes()).hexdigest()


class Chosen:
    """Some of the examples, by their numbers."""

    def __init__(self, examples: Examples, numbers: np.ndarray):
        self._examples, self._numbers = examples, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Example:
        return self._examples[int(self._numbers[index])]

    @property
    def fingerprint(self) -> str:
        numbers = hashlib.sha256(self._numbers.astype(np.int64).tobytes()).hexdigest()
        return f"{self._examples.fingerprint} {numbers}"


def facts(config: Any) -> Facts | None:
    """What a run on `config` will read; reads no image and prepares nothing.

    Returns:
        None for a set that must be prepared before anything is known of it.

    Raises:
        UserError: the configuration asks for what the set does not have.
    """
    data = config.data
    if data.name == "digits":
        return _facts(config, DIGITS)
    if data.name == "folder":
        return _facts(config, folder.open_folder(data.data_dir).info)
    from ekd_jax.data.tfds import records  # TFDS takes half a second to import

    info = records.info(data.name, data.data_dir, data.extra, data.test_split)
    info = info or records.nominal(data.name, data.extra)
    return _facts(config, info) if info else None


def known_facts(config: Any) -> Facts:
    """As `facts`, for those who cannot go on without.

    Raises:
        UserError: also for a set that must be prepared first.
    """
    known = facts(config)
    if known is None:
        raise UserError(
            f"{config.data.name} is not prepared in data.data_dir={config.data.data_dir!r}, so nothing is "
            f"known of it: prepare it first with python -m ekd_jax.prepare --config=..."
        )
    return known


def open_data(config: Any) -> Data:
    """Opens the data set that `config.data` names, preparing it first if need be; reads no image,
    unless data.corrupt=skip: then each is decoded once to know which ones to leave out.

    Raises:
        UserError: it is not there and cannot be had, its archive is damaged, or the configuration
            asks for what it does not have.
    """
    data = config.data
    source = _open(data)
    known = _facts(config, source.info)
    reader = Reader(known.input_shape, data.fit)
    train, test = source.train, source.test
    if data.corrupt == "skip":
        train, test = (without_corrupt(examples, reader) for examples in (train, test))
        changed = dataclasses.replace(source.info, train_examples=len(train), test_examples=len(test))
        known = _facts(config, changed)
    validation = None
    if known.validation_examples:
        mixed = order.held_out_last(len(train))
        kept, held_out = np.split(mixed, [len(train) - known.validation_examples])
        train, validation = Chosen(train, np.sort(kept)), Chosen(train, np.sort(held_out))
    if known.train_examples < len(train):
        train = Chosen(train, np.arange(known.train_examples))
    return Data(known, train, validation, test, reader)


def _open(data: Any) -> Source:
    if data.name == "digits":
        return _digits()
    if data.name == "folder":
        return folder.open_folder(data.data_dir)
    from ekd_jax.data.tfds import records

    return records.open(data.name, data.data_dir, data.manual_dir, data.extra, data.test_split)


def _digits() -> Source:
    """The UCI handwritten digits (digits.LICENSE): even images for training, odd ones for testing."""
    with np.load(pathlib.Path(__file__).with_name("digits.npz")) as file:
        images = np.round(file["images"][..., None] * (255 / 16)).astype(np.uint8)
        labels = file["labels"].astype(np.int32)
    train, test = (
        Pixels(images[i::2], labels[i::2], f"digits {n}") for i, n in enumerate(("train", "test"))
    )
    return Source(DIGITS, train, test)


def _facts(config: Any, info: Info) -> Facts:
    data = config.data
    if data.extra and info.name != "svhn_cropped":
        raise UserError(f"data.extra=True: {info.name} has no extra images; svhn_cropped does")
    left = info.train_examples - data.validation_examples
    if left < 1:
        raise UserError(
            f"data.validation_examples={data.validation_examples} leaves nothing to train on: "
            f"{info.name} has {info.train_examples} training examples"
        )
    if data.train_examples > left:
        raise UserError(
            f"data.train_examples={data.train_examples}: {info.name} has {left} training examples"
            + (" beside those for validation" if data.validation_examples else "")
        )
    height, width, channels = info.image_shape
    size = data.image_size
    if not size and (height is None or width is None):
        raise UserError(
            f"images of {info.name} may differ in size: say what the network takes, for example "
            f"--config.data.image_size=224 --config.data.fit=crop (or stretch)"
        )
    stored = (height or size, width or size)
    if size and stored != (size, size) and data.fit == "native":
        raise UserError(
            f"data.image_size={size}: images of {info.name} are {height}x{width}; "
            f"pass --config.data.fit=stretch or crop to change their size"
        )
    for name, values in (("mean", data.mean), ("std", data.std)):
        if len(values) not in (1, channels):
            raise UserError(f"data.{name}={values} must have one value or {channels}, one a channel")
    return Facts(
        name=info.name,
        input_shape=(size or stored[0], size or stored[1], channels),
        class_names=info.class_names,
        train_examples=data.train_examples or left,
        validation_examples=data.validation_examples,
        test_examples=info.test_examples,
    )


def read_one(
    examples: Examples, reader: Reader, facts: Facts, number: int, draws: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """Pixels and label of an example.

    Raises:
        UserError: the image cannot be read, or the label is out of range.
    """
    example = examples[number]
    if not 0 <= example.label < facts.num_classes:
        raise UserError(
            f"the label of {example.name} is {example.label}, but {facts.name} has {facts.num_classes} "
            f"classes, from 0: prepare the set again, or mend it"
        )
    return reader(example, draws), example.label


def without_corrupt(examples: Examples, reader: Reader) -> Examples:
    """The examples that can be read; says which ones cannot. What was found is remembered in the cache.

    Args:
        examples: all.
        reader: tries each.
    """
    digest = hashlib.sha256(f"{examples.fingerprint} {reader}".encode()).hexdigest()[:24]
    cache = user_cache()
    remembered = cache / f"corrupt-{digest}.json"
    if remembered.exists():
        corrupt = {int(number): why for number, why in json.loads(remembered.read_text()).items()}
    else:
        corrupt = _find_corrupt(examples, reader)
        cache.mkdir(parents=True, exist_ok=True)
        write_json(remembered, corrupt)
    for why in corrupt.values():
        print(f"left out: {why}", file=sys.stderr)
    if not corrupt:
        return examples
    print(f"left out {len(corrupt)} of {len(examples):,} images, which cannot be read", file=sys.stderr)
    return Chosen(examples, np.setdiff1d(np.arange(len(examples)), list(corrupt)))


def _find_corrupt(examples: Examples, reader: Reader) -> dict[int, str]:
    def trouble(number: int) -> str:
        try:
            reader(examples[number])
        except CorruptImageError as error:
            return str(error).partition(": mend")[0]
        return ""

    corrupt = {}
    progress = TaskProgress("looking for images that cannot be read", len(examples), 0, "images")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for number, why in enumerate(threads.map(trouble, range(len(examples)))):
            progress.add(1)
            if why:
                corrupt[number] = why
    progress.end()
    return corrupt
