"""TODO: runs.evaluation."""

import pathlib
from collections.abc import Callable, Sequence
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
from ekd_jax.data.feed import EvaluationSet, evaluation_set
from ekd_jax.data.opening import open_data
from ekd_jax.data.stream import evaluation_batch
from ekd_jax.models.ensemble import Variables
from ekd_jax.runs.restore import restore
from ekd_jax.students.student import LoadedStudent

Array = jax.Array
Results = dict[str, float]
Folders = dict[str, str]


def make_evaluator(
    predict: Callable[[Variables, Array], Array], config: Any, examples: int, mesh: Mesh
) -> Any:
    """A jitted function of (variables, images uint8, labels, number) that gives sums over examples.

    Only the first `number` images count; what fills the last batch up does not. So each example
    counts once for any batch size and any number of devices.

    Args:
        predict: (variables, images float normalized) -> logits (P, B, K).
        config: resolved; `data.mean`, `data.std` and `evaluate.batch_size` are read.
        examples: how many there are in all.
        mesh: devices that share a batch.

    Returns:
        The function; its result is (3, P): how many were right, how many among the five likeliest,
        and the sum of the negative log likelihoods (nats).
    """
    batch_size = evaluation_batch(config, examples, mesh)

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
    """Sums over all examples, (3, P) float64, by a function that `make_evaluator` gave."""
    sums = [
        evaluate(variables, images, labels, parallel.replicate(mesh, np.int32(number)))
        for images, labels, number in examples.chunks()
    ]
    return np.asarray(jax.device_get(sums), np.float64).sum(0)


def results(sums: np.ndarray, examples: int, names: Sequence[str]) -> Results:
    """`{"student_1/top1": per cent, "student_1/top5": per cent, "student_1/nll": nats, ...}`."""
    means = sums / examples
    scale = {"top1": 100.0, "top5": 100.0, "nll": 1.0}
    return {
        f"{name}/{metric}": float(means[m, p] * scale[metric])
        for p, name in enumerate(names)
        for m, metric in enumerate(scale)
    }


def evaluate_run(
    path: pathlib.Path,
    step: int | None = None,
    best: bool = False,
    folders: Folders | None = None,
    split: str = "test",
) -> tuple[int, Results]:
    """Evaluates a checkpoint of a run.

    Args:
        path: of the run.
        step: of the checkpoint; the latest if not given.
        best: the kept checkpoint in which the ensemble did best, instead.
        folders: `data_dir` and `manual_dir`, where they are no longer what the run used.
        split: "test", or "validation": the images that the run held out.

    Returns:
        The step, and `{"student_1/top1": per cent, ...}`.
    """
    restored = restore(path, step, "ensemble/top1" if best else None)
    config = at(restored.run.config, folders or {})
    found = _evaluate(restored.predict, restored.variables, config, restored.names, split)
    return restored.step, found


def evaluate_student(student: LoadedStudent, folders: Folders | None = None) -> Results:
    """Evaluates a student that was taken out on the test set it was made for, found in `folders`."""
    own = student.description
    data = {k: own["preprocessing"][k] for k in ("mean", "std", "fit", "image_size")}
    data |= {"name": own["provenance"]["data"], "test_split": own["provenance"]["test_split"]}
    config = at(resolve({"data": data}), folders or {})

    def predict(variables: Variables, images: Array) -> Array:
        return student.model.logits(variables, images)[None]

    return _evaluate(predict, student.variables, config, [f"student_{own['student']}"])


def at(config: Any, folders: Folders) -> Any:
    """The configuration with the data looked for elsewhere."""
    changed = ConfigDict(config)
    changed.data.update({name: folder for name, folder in folders.items() if folder})
    return FrozenConfigDict(changed)


def _evaluate(
    predict: Callable[[Variables, Array], Array],
    variables: Variables,
    config: Any,
    names: list[str],
    split: str = "test",
) -> Results:
    mesh, data = parallel.make_mesh(), open_data(config)
    if split == "validation" and data.validation is None:
        raise UserError("--split=validation: the run held no images out (data.validation_examples=0)")
    examples = evaluation_set(config, data, mesh, split)
    evaluate = make_evaluator(predict, config, examples.examples, mesh)
    sums = measure(evaluate, parallel.replicate(mesh, variables), examples, mesh)
    return results(sums, examples.examples, names)
