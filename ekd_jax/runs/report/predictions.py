"""The answers of a run's predictors to every test image, and the images themselves."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.common.progress import Progress
from ekd_jax.data.augment import normalize
from ekd_jax.data.feed import evaluation_set
from ekd_jax.data.opening import Data, open_data, read_example
from ekd_jax.runs.run import Run, make_predict


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The answers of P predictors to N images.

    Attributes:
        names: of the predictors.
        step: of the checkpoint.
        labels: class of each image, (N,).
        predicted: the class that each predictor takes each image for, (P, N).
        confidence: its probability, (P, N) float32.
    """

    names: tuple[str, ...]
    step: int
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Whether each predictor is right about each image, (P, N) bool."""
        right: np.ndarray = self.predicted == self.labels
        return right


def test_data(run: Run) -> Data:
    """Open the data of a run, with its input size and its classes.

    Raises:
        UserError: it is missing, or has other classes.
    """
    own = run.description
    return open_data(run.config).with_input(own.input_shape).with_classes(own.class_names, "the run")


def predict_all(run: Run, data: Data) -> Predictions:
    """Return the answers of every predictor of a run to every test image, in the order of the data.

    Raises:
        UserError: the checkpoint is missing or damaged, or an image cannot be read.
    """
    mesh = parallel.make_mesh(jax.devices()[:1])
    examples = evaluation_set(run.config, data, mesh, "test")
    size = min(run.config.evaluate.batch_size, examples.examples)
    predict = make_predict(run.networks)

    @jax.jit
    def answer(variables: Any, images: jax.Array, labels: jax.Array, place: jax.Array) -> Any:
        logits = predict(variables, normalize(images[place], run.config.data.mean, run.config.data.std))
        return labels[place], logits.argmax(-1), jax.nn.softmax(logits).max(-1)

    variables = parallel.replicate(mesh, run.checkpoint.variables)
    progress = Progress(f"predictions of {run.path}", examples.examples, unit="images")
    parts = []
    for images, labels, number in examples.chunks():
        for start in range(0, number, size):
            place = jnp.minimum(start + jnp.arange(size), number - 1)  # one shape, and so one compilation
            found = jax.device_get(answer(variables, images, labels, place))
            parts.append([array[..., : min(size, number - start)] for array in found])
            progress.add(min(size, number - start))
    progress.clear()
    return Predictions(
        tuple(run.names),
        run.checkpoint.step,
        *(np.concatenate(each, -1) for each in zip(*parts, strict=True)),
    )


def read_images(data: Data, places: Sequence[int], labels: np.ndarray) -> np.ndarray:
    """Return test images (B, H, W, C) uint8 by their places.

    Args:
        data: as `test_data` opens it.
        places: of the images, from 0.
        labels: of all test images, as they were predicted; for a check.

    Raises:
        UserError: an image cannot be read, or its label is another one than when it was predicted.
    """
    pairs = [read_example(data.test, data.reader, data.facts, place) for place in places]
    if any(label != labels[place] for place, (_, label) in zip(places, pairs, strict=True)):
        raise UserError("the test images are in another order than when they were predicted")
    return np.stack([pixels for pixels, _ in pairs])
