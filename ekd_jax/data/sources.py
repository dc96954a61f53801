"""Where images come from: the embedded digits, or CIFAR through TensorFlow Datasets.

TensorFlow itself is not needed. A set that fits the device is read whole, as uint8.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from ekd_jax.data.dataset import Dataset, Info
from ekd_jax.errors import UserError

INFO = {
    info.name: info
    for info in (
        Info("digits", (8, 8, 1), 10, 899, 898),
        Info("cifar10", (32, 32, 3), 10, 50_000, 10_000),
        Info("cifar100", (32, 32, 3), 100, 50_000, 10_000),
    )
}


def info(config: Any) -> Info:
    """What a run on `config` will read, `data.train_examples` applied; reads nothing.

    Raises:
        UserError: more training examples asked for than there are.
    """
    found = INFO[config.data.name]
    wanted = config.data.train_examples
    if wanted > found.train_examples:
        raise UserError(
            f"data.train_examples={wanted}: {found.name} has {found.train_examples} training examples"
        )
    channels = found.input_shape[2]
    for name, values in (("mean", config.data.mean), ("std", config.data.std)):
        if len(values) not in (1, channels):
            raise UserError(f"data.{name}={values} must have one value or {channels}, one a channel")
    return dataclasses.replace(found, train_examples=wanted or found.train_examples)


def load(config: Any) -> Dataset:
    """Reads the data set that `config.data` names.

    Raises:
        UserError: it is not there and cannot be had, or its archive is damaged.
    """
    data, count = config.data, info(config).train_examples
    if data.name == "digits":
        return _digits(count)
    from ekd_jax.data import cifar  # TFDS takes half a second to import

    return cifar.load(data.name, data.data_dir, data.manual_dir, count)


def _digits(count: int) -> Dataset:
    """The UCI handwritten digits (digits.LICENSE): even images for training, odd ones for testing."""
    with np.load(pathlib.Path(__file__).with_name("digits.npz")) as file:
        images = np.round(file["images"][..., None] * (255 / 16)).astype(np.uint8)
        labels = file["labels"].astype(np.int32)
    names = tuple("zero one two three four five six seven eight nine".split())
    return Dataset(images[::2][:count], labels[::2][:count], images[1::2], labels[1::2], names)
