"""The answers of runs to every test image, and the images themselves."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.common.log import logger
from ekd_jax.common.progress import Progress
from ekd_jax.data.augment import normalize
from ekd_jax.data.feed import evaluation_set
from ekd_jax.data.opening import Data, open_data, read_example
from ekd_jax.runs.report.reading import Group
from ekd_jax.runs.run import Run, make_predict

NOT_ASKED = "the test images were not to be read (--nopredictions)"


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


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers of a group's runs, and the test images; or why there are none.

    Attributes:
        group: whose runs these are.
        runs: those that could be asked, by seed.
        each: the predictions of each of them; empty if none could be asked.
        data: the test images.
        reasons: why runs could not be asked, one line each.
    """

    group: Group
    runs: tuple[Run, ...] = ()
    each: tuple[Predictions, ...] = ()
    data: Data | None = None
    reasons: tuple[str, ...] = ()

    @property
    def first(self) -> Predictions:
        """The predictions of the run with the smallest seed."""
        return self.each[0]

    @property
    def named(self) -> str:
        """The group's label, and how many runs were asked if several."""
        return f"{self.group.label}, n = {len(self.runs)}" if len(self.runs) > 1 else self.group.label

    @property
    def first_named(self) -> str:
        """The group's label, and the seed of the first run that was asked if there are several."""
        several = len(self.group.runs) > 1
        return f"{self.group.label}, seed {self.runs[0].config.seed}" if several else self.group.label


def ask(groups: Sequence[Group]) -> list[Answers]:
    """Predict all test images by every run of every group; what cannot be had has a reason."""
    return [_ask(group) for group in groups]


def _ask(group: Group) -> Answers:
    try:
        data = test_data(group.run)
    except UserError as error:
        logger.warning(f"{group.label}: no predictions: {error}")
        return Answers(group, reasons=(str(error),))
    asked, reasons, answer = [], [], make_answer(group.run)
    for run in group.runs:
        try:
            asked.append((run.run, predict_all(run.run, data, answer)))
        except UserError as error:
            logger.warning(f"{group.label}, seed {run.seed}: no predictions: {error}")
            reasons.append(str(error))
    runs, each = tuple(run for run, _ in asked), tuple(given for _, given in asked)
    return Answers(group, runs, each, data, tuple(reasons))


def not_asked(groups: Sequence[Group]) -> list[Answers]:
    """Return no answers, because they were not asked for."""
    return [Answers(group, reasons=(NOT_ASKED,)) for group in groups]


def test_data(run: Run) -> Data:
    """Open the data of a run, with its input size and its classes.

    Raises:
        UserError: it is missing, or has other classes.
    """
    own = run.description
    return open_data(run.config).with_input(own.input_shape).with_classes(own.class_names, "the run")


def make_answer(run: Run) -> Any:
    """Return what `predict_all` runs for each batch, for runs that differ from one in their variables alone."""
    predict, data = make_predict(run.networks), run.config.data

    @jax.jit
    def answer(variables: Any, images: jax.Array, labels: jax.Array, place: jax.Array) -> Any:
        logits = predict(variables, normalize(images[place], data.mean, data.std))
        return labels[place], logits.argmax(-1), jax.nn.softmax(logits).max(-1)

    return answer


def predict_all(run: Run, data: Data, answer: Any = None) -> Predictions:
    """Return the answers of every predictor of a run to every test image, in the order of the data.

    Args:
        run: whose latest checkpoint predicts.
        data: as `test_data` opens it.
        answer: as `make_answer` returns it for a run that differs in its seed alone, so that it is compiled once.

    Raises:
        UserError: the checkpoint is missing or damaged, or an image cannot be read.
    """
    mesh = parallel.make_mesh(jax.devices()[:1])
    examples = evaluation_set(run.config, data, mesh, "test")
    size = min(run.config.evaluate.batch_size, examples.examples)
    answer = answer or make_answer(run)
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
