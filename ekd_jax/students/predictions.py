"""Predictions of a student for image files, many at a time."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator, Sequence

import numpy as np

from ekd_jax.common.errors import UserError
from ekd_jax.common.progress import Progress
from ekd_jax.students.student import LoadedStudent, read_image

BATCH = 64  # images per dispatch; the last batch is filled up, so that one program serves all


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image.

    Attributes:
        file: the image.
        classes: their names, the likeliest first; empty if the image could not be read.
        probabilities: one for each of these classes.
        problem: why the image could not be read, "" if it could.
    """

    file: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    problem: str = ""


def predict_files(
    student: LoadedStudent, files: Sequence[str], top: int, max_pixels: int
) -> Iterator[Prediction]:
    """Yield the prediction for each image file, in order; one that cannot be read does not end it.

    Args:
        student: the network.
        files: image files.
        top: how many classes are wanted; at most as many as there are.
        max_pixels: largest image that is decoded, in pixels.
    """
    progress = Progress("predicting", len(files), unit="images") if len(files) > BATCH else None
    size = min(BATCH, len(files))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for first in range(0, len(files), BATCH):
            chunk = files[first : first + BATCH]
            images, problems = zip(
                *threads.map(lambda file: _read(file, student, max_pixels), chunk), strict=True
            )
            batch = np.concatenate([*images, np.zeros((size - len(chunk), *student.input_shape), np.uint8)])
            probabilities = np.asarray(student.predict(batch))
            for file, row, problem in zip(chunk, probabilities, problems, strict=False):
                yield Prediction(file, problem=problem) if problem else _likeliest(student, file, row, top)
            if progress:
                progress.add(len(chunk))
    if progress:
        progress.finish()


def _read(file: str, student: LoadedStudent, max_pixels: int) -> tuple[np.ndarray, str]:
    """Return an image (1, H, W, C) uint8, and why it could not be read; it is black then."""
    try:
        return read_image(file, student, max_pixels), ""
    except UserError as error:
        return np.zeros((1, *student.input_shape), np.uint8), str(error)


def _likeliest(student: LoadedStudent, file: str, row: np.ndarray, top: int) -> Prediction:
    order = np.argsort(-row, kind="stable")[:top]
    names = tuple(student.class_names[k] for k in order)
    return Prediction(file, names, tuple(float(row[k]) for k in order))
