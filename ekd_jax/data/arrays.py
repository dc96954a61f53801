"""A data set in memory: images and labels as arrays."""

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ekd_jax.common.errors import UserError
from ekd_jax.data.dataset import Example, Examples, Facts, Joined, Relabeled, Source, Subset

ARRAYS = "arrays"  # value of `data.name` for arrays that are passed from Python


class ArrayExamples:
    """Examples in memory.

    Args:
        images: (N, H, W, C) uint8.
        labels: (N,) integers.
        name: name of the set, for messages.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, name: str):
        self._images, self.labels, self._name = images, labels, name

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self.labels[index]), f"{self._name}[{index}]")

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all pixels and labels."""
        digest = hashlib.sha256(np.ascontiguousarray(self._images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


def in_memory(examples: Examples) -> bool:
    """Return whether examples, or the set that they are chosen from, are arrays in memory."""
    if isinstance(examples, Subset | Relabeled):
        return in_memory(examples.examples)
    if isinstance(examples, Joined):
        return all(map(in_memory, examples.parts))
    return isinstance(examples, ArrayExamples)


def from_arrays(
    images: npt.ArrayLike,
    labels: npt.ArrayLike,
    class_names: Sequence[str],
    test_images: npt.ArrayLike,
    test_labels: npt.ArrayLike,
    name: str = ARRAYS,
) -> Source:
    """Return a data set of arrays, which are not copied: leave them as they are while the set is in use.

    Args:
        images: training images (N, H, W, C) uint8, with C = 1 (gray) or 3 (RGB); their order does not matter.
        labels: (N,) integers, indices into `class_names`.
        class_names: name of each class.
        test_images: test images (M, H, W, C) uint8.
        test_labels: (M,) integers.
        name: name of the set, for messages.

    Raises:
        UserError: an array has the wrong shape or data type, a label is out of range, or class names are
            missing or repeated.
    """
    names = _checked_class_names(class_names)
    train = _checked_examples(images, labels, names, f"{name} train", ("images", "labels"))
    test = _checked_examples(
        test_images, test_labels, names, f"{name} test", ("test_images", "test_labels")
    )
    shape, test_shape = train[0].image.shape, test[0].image.shape  # type: ignore[union-attr]
    if shape != test_shape:
        raise UserError(
            f"images are {_by(shape)} and test_images {_by(test_shape)}: bring them to one size (H, W, C)"
        )
    height, width, channels = shape
    return Source(Facts(name, (height, width, channels), names, len(train), len(test)), train, test)


def _checked_class_names(class_names: Sequence[str]) -> tuple[str, ...]:
    names = () if isinstance(class_names, str) else tuple(class_names)
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"class_names={class_names!r} must be a sequence of strings, one per class")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"class_names has {repeated[0]!r} more than once: every class needs its own name")
    if len(names) < 2:
        raise UserError(f"class_names={names!r}: two or more classes are needed, so that there is a choice")
    return names


def _checked_examples(
    images: npt.ArrayLike,
    labels: npt.ArrayLike,
    class_names: tuple[str, ...],
    name: str,
    arguments: tuple[str, str],
) -> ArrayExamples:
    """Return arrays as examples; `arguments` are what images and labels are called in messages."""
    images_name, labels_name = arguments
    pixels, numbers = np.asarray(images), np.asarray(labels)
    if pixels.dtype != np.uint8:
        hint = ": multiply by 255 and round" if pixels.dtype.kind == "f" else ""
        raise UserError(f"{images_name} must be uint8, 0 to 255, not {pixels.dtype}{hint}")
    if pixels.ndim == 3:
        raise UserError(
            f"{images_name} {_by(pixels.shape)} must be (N, H, W, C): add the axis of channels, for gray "
            f"images as in {images_name}[..., None]"
        )
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        hint = ": move the axis of channels last" if pixels.ndim == 4 and pixels.shape[1] in (1, 3) else ""
        raise UserError(f"{images_name} {_by(pixels.shape)} must be (N, H, W, C) with C of 1 or 3{hint}")
    if 0 in pixels.shape:
        raise UserError(f"{images_name} {_by(pixels.shape)} holds no images")
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        hint = ": take their argmax over the last axis" if numbers.ndim == 2 else ""
        raise UserError(
            f"{labels_name} must be integers (N,), not {numbers.dtype} {_by(numbers.shape)}{hint}"
        )
    if len(numbers) != len(pixels):
        raise UserError(
            f"{labels_name} has {len(numbers):,} labels, but {images_name} has {len(pixels):,} images"
        )
    bad = np.flatnonzero((numbers < 0) | (numbers >= len(class_names)))
    if len(bad):
        raise UserError(
            f"{labels_name}[{bad[0]}] is {numbers[bad[0]]}, but class_names has {len(class_names)} classes: "
            f"labels are from 0 to {len(class_names) - 1}"
        )
    return ArrayExamples(pixels, numbers.astype(np.int32), name)


def _by(shape: Sequence[int]) -> str:
    """Return a shape as text, "60000x28x28"."""
    return "x".join(map(str, shape)) or "of no axis"
