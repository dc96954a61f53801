"""Evaluation over every test example exactly once, for any batch size and any number of devices."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.config.resolve import resolve
from ekd_jax.data.augment import normalize
from ekd_jax.data.dataset import Source
from ekd_jax.data.feed import EvaluationSet, evaluation_set
from ekd_jax.data.opening import open_data
from ekd_jax.data.stream import evaluation_batch_size
from ekd_jax.models.ensemble import Variables
from ekd_jax.students.student import LoadedStudent

Array = jax.Array
Results = dict[str, float]
Predict = Callable[[Variables, Array], Array]


def make_evaluator(predict: Predict, config: FrozenConfigDict, examples: int, mesh: Mesh) -> Any:
    """Make a jitted function of (variables, images uint8, labels, number) that returns sums over examples.

    Only the first `number` images count; images that fill up the last batch do not.

    Args:
        predict: (variables, normalized float images) -> logits (P, B, K) of P predictors.
        config: a complete configuration; `data.mean`, `data.std` and `evaluate.batch_size` are read.
        examples: how many there are in all.
        mesh: devices that share a batch.

    Returns:
        The function. Its result is (3, P): the number of correct predictions, of labels among the five
        likeliest classes, and the sum of negative log likelihoods in nats.
    """
    batch_size = evaluation_batch_size(config, examples, mesh)

    def evaluate(variables: Variables, images: Array, labels: Array, number: Array) -> Array:
        variables = parallel.whole(mesh, variables)

        def scores(images: Array, labels: Array, counts: Array) -> Array:
            logits = predict(variables, normalize(images, config.data.mean, config.data.std))
            wanted = jnp.broadcast_to(labels, logits.shape[:2])[..., None]
            _, likeliest = lax.top_k(logits, min(5, logits.shape[-1]))
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), wanted, -1)[..., 0]
            each = jnp.stack([likeliest[..., 0] == wanted[..., 0], (likeliest == wanted).any(-1), nll])
            return jnp.where(counts, each, 0).sum(-1)

        def body(i: Array, sums: Array) -> Array:
            place = i * batch_size + jnp.arange(batch_size)
            place = lax.with_sharding_constraint(place, parallel.split(mesh))
            counts, place = place < number, jnp.minimum(place, number - 1)
            return sums + scores(images[place], labels[place], counts)

        if len(images) == batch_size:  # as streamed batches are
            return scores(images, labels, jnp.arange(batch_size) < number)
        predictors = jax.eval_shape(predict, variables, normalize(images[:1], (0.0,), (1.0,))).shape[0]
        return lax.fori_loop(0, -(-number // batch_size), body, jnp.zeros((3, predictors), jnp.float32))

    return jax.jit(evaluate, out_shardings=parallel.replicated(mesh))


def measure(evaluate: Any, variables: Variables, examples: EvaluationSet, mesh: Mesh) -> np.ndarray:
    """Return the sums over all examples, (3, P) float64, of a function that `make_evaluator` made."""
    sums = [
        evaluate(variables, images, labels, parallel.replicate(mesh, np.int32(number)))
        for images, labels, number in examples.chunks()
    ]
    return np.asarray(jax.device_get(sums), np.float64).sum(0)


def results(sums: np.ndarray, examples: int, names: Sequence[str]) -> Results:
    """Return `{"student_1/top1": per cent, "student_1/top5": per cent, "student_1/nll": nats, ...}`."""
    means = sums / examples
    scale = {"top1": 100.0, "top5": 100.0, "nll": 1.0}
    return {
        f"{name}/{metric}": float(means[m, p] * scale[metric])
        for p, name in enumerate(names)
        for m, metric in enumerate(scale)
    }


def evaluate_predictor(
    predict: Predict,
    variables: Variables,
    config: FrozenConfigDict,
    names: Sequence[str],
    split: str = "test",
    source: Source | None = None,
) -> Results:
    """Evaluate predictors on a data set.

    Args:
        predict: (variables, normalized float images) -> logits (P, B, K).
        variables: its first argument, numpy arrays.
        config: a complete configuration, which names the data.
        names: of the P predictors.
        split: "test" or "validation".
        source: the data set itself, if it is in memory.

    Raises:
        UserError: the data is missing or has no such split.
    """
    mesh, data = parallel.make_mesh(), open_data(config, source)
    if split == "validation" and data.validation is None:
        raise UserError("--split=validation: the run held no images out (data.validation_examples=0)")
    examples = evaluation_set(config, data, mesh, split)
    evaluate = make_evaluator(predict, config, examples.examples, mesh)
    sums = measure(evaluate, parallel.replicate(mesh, variables), examples, mesh)
    return results(sums, examples.examples, names)


def evaluate_student(
    student: LoadedStudent, places: Mapping[str, str] | None = None, source: Source | None = None
) -> Results:
    """Evaluate an extracted student on the test set that it was made for.

    Args:
        student: as `load_student` returns it.
        places: `data_dir` and `manual_dir`, if the data is not where TFDS keeps it.
        source: the data set itself, if it is in memory.

    Returns:
        `{"student_<n>/top1": per cent, "student_<n>/top5": per cent, "student_<n>/nll": nats}`.
    """
    own = student.description
    images = own.preprocessing
    data = {"mean": images.mean, "std": images.std, "fit": images.fit, "image_size": images.image_size}
    data |= {"name": own.provenance.data, "test_split": own.provenance.test_split}
    config = with_places(resolve({"data": data, "imports": own.network.imports}), places or {})

    def predict(variables: Variables, images: Array) -> Array:
        return student.network.logits(variables, images)[None]

    return evaluate_predictor(predict, student.variables, config, [f"student_{own.student}"], source=source)


def with_places(config: FrozenConfigDict, places: Mapping[str, str]) -> FrozenConfigDict:
    """Return the configuration with other data directories, where `places` has them."""
    changed = ConfigDict(config)
    changed.data.update({name: place for name, place in places.items() if place})
    return FrozenConfigDict(changed)
