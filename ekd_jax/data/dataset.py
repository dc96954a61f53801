"""What a data set is, before and after it is read."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Info:
    """What is known of a data set before it is read."""

    name: str
    input_shape: tuple[int, int, int]  # H, W, C
    num_classes: int
    train_examples: int
    test_examples: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images (N, H, W, C) uint8, labels (N,) int32, and the classes' names."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
