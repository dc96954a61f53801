"""Evaluation over every example of a split exactly once, for any batch size and any number of devices."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.log import logger
from ekd_jax.config.knobs import KNOBS
from ekd_jax.config.resolve import resolve
from ekd_jax.data.augment import normalize
from ekd_jax.data.classes import listed
from ekd_jax.data.dataset import Source
from ekd_jax.data.feed import EvaluationSet, evaluation_set
from ekd_jax.data.opening import open_data
from ekd_jax.data.stream import evaluation_batch_size
from ekd_jax.models.ensemble import Variables
from ekd_jax.students.description import ClassScores
from ekd_jax.students.student import LoadedStudent

Array = jax.Array
Results = dict[str, float]
Predict = Callable[[Variables, Array], Array]
OF_ONE_SET = ("test_split", "extra", "train_examples", "validation_examples")  # knobs in the section data
OTHER_DEVICE = 0.002  # share of the images that another kind of device may put into another class
SPLITS = ("test", "validation", "train", "all")


@dataclasses.dataclass(frozen=True)
class ClassCounts:
    """Numbers of images by class, of P predictors and K classes.

    Attributes:
        images: images of each class, (K,).
        predicted: images that each predictor takes for each class, (P, K).
        correct: images of each class that each predictor gets right, (P, K).
        confusion: images of each class (rows) by the class that they are taken for (columns), (P, K, K); only
            if it was asked for.
    """

    images: np.ndarray
    predicted: np.ndarray
    correct: np.ndarray
    confusion: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation(Mapping[str, float]):
    """The metrics of several predictors on a set, by name: `evaluation["student_1/top1"]`.

    The names are `<predictor>/top1`, `/top5` and `/macro_recall`, `/macro_precision`, `/macro_f1` in per cent, and
    `/nll` in nats. A macro average is the mean over the classes that the set has. A class that is never predicted
    has precision 0, as in scikit-learn.

    Attributes:
        metrics: the metrics.
        names: of the P predictors.
        class_names: of the K classes of the predictors.
        counts: numbers of images by class.
    """

    metrics: Results
    names: tuple[str, ...]
    class_names: tuple[str, ...]
    counts: ClassCounts

    def __getitem__(self, name: str) -> float:
        return self.metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    @property
    def examples(self) -> int:
        """Number of images."""
        return int(self.counts.images.sum())

    @property
    def absent(self) -> list[str]:
        """Names of the classes without an image in the set."""
        return [name for name, n in zip(self.class_names, self.counts.images, strict=True) if not n]

    def of_classes(self, predictor: str) -> dict[str, dict[str, float]]:
        """Return `{class name: {"images": n, "recall": per cent, "precision": ..., "f1": ...}}` of a predictor.

        Classes without an image in the set are left out.
        """
        scores = class_scores(self.counts)
        row = self.names.index(predictor)
        return {
            name: {
                "images": int(self.counts.images[k]),
                **{metric: float(values[row, k]) for metric, values in scores.items()},
            }
            for k, name in enumerate(self.class_names)
            if self.counts.images[k]
        }


def class_scores(counts: ClassCounts) -> dict[str, np.ndarray]:
    """Return recall, precision and F1 of each predictor and class in per cent, (P, K); 0 where undefined."""
    recall = _share(counts.correct, counts.images)
    precision = _share(counts.correct, counts.predicted)
    f1 = _share(2 * counts.correct, counts.images + counts.predicted)
    return {"recall": 100 * recall, "precision": 100 * precision, "f1": 100 * f1}


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    whole = np.broadcast_to(whole, part.shape)
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)


def make_evaluator(
    predict: Predict,
    config: FrozenConfigDict,
    examples: int,
    mesh: Mesh,
    classes: int = 0,
    confusion: bool = False,
) -> Any:
    """Make a jitted function of (variables, images uint8, labels, number) that returns sums over examples.

    Only the first `number` images count; images that fill up the last batch do not.

    Args:
        predict: (variables, normalized float images) -> logits (P, B, K) of P predictors.
        config: a complete configuration; `data.mean`, `data.std` and `evaluate.batch_size` are read.
        examples: how many there are in all.
        mesh: devices that share a batch.
        classes: K, to count images by class, too; 0: do not.
        confusion: also count the images of each class by the class that they are taken for.

    Returns:
        The function. Its result is a dict. `scores` is (3, P) float32: the number of correct predictions, of
        labels among the five likeliest classes, and the sum of negative log likelihoods in nats. The others are
        the fields of `ClassCounts`, int32.
    """
    batch_size = evaluation_batch_size(config, examples, mesh)

    def evaluate(variables: Variables, images: Array, labels: Array, number: Array) -> dict[str, Array]:
        variables = parallel.whole(mesh, variables)

        def sums_of(images: Array, labels: Array, counts: Array) -> dict[str, Array]:
            logits = predict(variables, normalize(images, config.data.mean, config.data.std))
            wanted = jnp.broadcast_to(labels, logits.shape[:2])[..., None]
            _, likeliest = lax.top_k(logits, min(5, logits.shape[-1]))
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), wanted, -1)[..., 0]
            each = jnp.stack([likeliest[..., 0] == wanted[..., 0], (likeliest == wanted).any(-1), nll])
            by_class = _by_class(likeliest[..., 0], labels, counts, classes, confusion) if classes else {}
            return {"scores": jnp.where(counts, each, 0).sum(-1), **by_class}

        def body(i: Array, sums: dict[str, Array]) -> dict[str, Array]:
            place = i * batch_size + jnp.arange(batch_size)
            place = lax.with_sharding_constraint(place, parallel.split(mesh))
            counts, place = place < number, jnp.minimum(place, number - 1)
            return jax.tree.map(jnp.add, sums, sums_of(images[place], labels[place], counts))

        if len(images) == batch_size:  # as streamed batches are
            return sums_of(images, labels, jnp.arange(batch_size) < number)
        shapes = jax.eval_shape(sums_of, images[:1], labels[:1], jnp.ones(1, bool))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return lax.fori_loop(0, -(-number // batch_size), body, zeros)

    return jax.jit(evaluate, out_shardings=parallel.replicated(mesh))


def _by_class(
    predicted: Array, labels: Array, counts: Array, classes: int, confusion: bool
) -> dict[str, Array]:
    """Count the images of a batch by class, as int32.

    Args:
        predicted: the class that each predictor takes each image for, (P, B).
        labels: (B,).
        counts: which images count, (B,) bool.
        classes: K.
        confusion: also count by label and prediction together.
    """
    row, ones = jnp.arange(len(predicted))[:, None], counts.astype(jnp.int32)
    zeros = jnp.zeros((len(predicted), classes), jnp.int32)
    found = {
        "images": jnp.zeros(classes, jnp.int32).at[labels].add(ones),
        "predicted": zeros.at[row, predicted].add(ones),
        "correct": zeros.at[row, predicted].add(ones * (predicted == labels)),
    }
    if confusion:
        square = jnp.zeros((*zeros.shape, classes), jnp.int32)
        found["confusion"] = square.at[row, labels, predicted].add(ones)
    return found


def measure(
    evaluate: Any, variables: Variables, examples: EvaluationSet, mesh: Mesh
) -> dict[str, np.ndarray]:
    """Return the sums over all examples, float64 and int64, of a function that `make_evaluator` made."""
    sums = [
        evaluate(variables, images, labels, parallel.replicate(mesh, np.int32(number)))
        for images, labels, number in examples.chunks()
    ]

    def total(*parts: np.ndarray) -> np.ndarray:
        exact = np.float64 if parts[0].dtype.kind == "f" else np.int64
        return np.sum(np.asarray(parts, exact), axis=0)

    found: dict[str, np.ndarray] = jax.tree.map(total, *jax.device_get(sums))
    return found


def results(scores: np.ndarray, examples: int, names: Sequence[str]) -> Results:
    """Return `{"student_1/top1": per cent, "student_1/top5": per cent, "student_1/nll": nats, ...}`."""
    means = scores / examples
    scale = {"top1": 100.0, "top5": 100.0, "nll": 1.0}
    return {
        f"{name}/{metric}": float(means[m, p] * scale[metric])
        for p, name in enumerate(names)
        for m, metric in enumerate(scale)
    }


@dataclasses.dataclass(frozen=True)
class Predictors:
    """Networks that are evaluated together.

    Attributes:
        call: (variables, normalized float images) -> logits (P, B, K).
        variables: its first argument, numpy arrays.
        names: of the P predictors.
        class_names: of the K classes, in the order of the logits.
        input_shape: H, W, C of the images.
    """

    call: Predict
    variables: Variables
    names: Sequence[str]
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]


def evaluate_predictors(
    predictors: Predictors,
    config: FrozenConfigDict,
    split: str = "test",
    source: Source | None = None,
    confusion: bool = False,
) -> Evaluation:
    """Evaluate predictors on a data set, whose classes are matched by name.

    Classes of the predictors that the set does not have may be predicted, and are wrong then.

    Args:
        predictors: the networks.
        config: a complete configuration, which names the data.
        split: one of SPLITS; "all" is every image of the set.
        source: the data set itself, if it is in memory.
        confusion: also count images by class and predicted class.

    Raises:
        UserError: the data is missing, has no such split, or has a class that the predictors do not have.
    """
    names, class_names = predictors.names, predictors.class_names
    mesh, data = parallel.make_mesh(), open_data(config, source)
    data = (
        data.to_evaluate(split).with_input(predictors.input_shape).with_classes(class_names, "the student")
    )
    examples = evaluation_set(config, data, mesh, "test")
    evaluate = make_evaluator(predictors.call, config, examples.examples, mesh, len(class_names), confusion)
    sums = measure(evaluate, parallel.replicate(mesh, predictors.variables), examples, mesh)
    metrics, counts = results(sums.pop("scores"), examples.examples, names), ClassCounts(**sums)
    present = counts.images > 0
    for metric, values in class_scores(counts).items():
        means = values[:, present].mean(-1)
        metrics |= {f"{name}/macro_{metric}": float(mean) for name, mean in zip(names, means, strict=True)}
    found = Evaluation(metrics, tuple(names), class_names, counts)
    if found.absent:
        logger.warning(
            f"{data.facts.name} ({split}) has images of {present.sum()} of the {len(class_names)} classes of the "
            f"student, none of {listed(found.absent)}"
        )
    return found


def evaluate_student(
    student: LoadedStudent,
    data: Mapping[str, str | None] | None = None,
    source: Source | None = None,
    split: str = "test",
    confusion: bool = False,
) -> Evaluation:
    """Evaluate an extracted student on the test set that it was made for, or on another set.

    Args:
        student: as `load_student` returns it.
        data: knobs of the section `data` that differ: `data_dir` and `manual_dir` if the data is not where TFDS
            keeps it, `name` to evaluate on another set, `corrupt="skip"` to leave out images that cannot be read.
        source: the data set itself, if it is in memory.
        split: "test", "train", or "all" for all of these together.
        confusion: also count images by class and predicted class.

    Returns:
        Metrics named `student_<n>/top1` and so on.

    Raises:
        UserError: the data is missing, or has a class that the student does not have.
    """
    own = student.description
    changes = {**(data or {}), **({"name": source.name} if source else {})}

    def predict(variables: Variables, images: Array) -> Array:
        return student.network.logits(variables, images)[None]

    predictors = Predictors(
        call=predict,
        variables=student.variables,
        names=[f"student_{own.student}"],
        class_names=student.class_names,
        input_shape=student.input_shape,
    )
    config = with_data(config_of(student), changes, student.input_shape)
    return evaluate_predictors(predictors, config, split, source, confusion)


def with_class_scores(student: LoadedStudent, found: Evaluation) -> LoadedStudent:
    """Return a student whose description has the scores of each class, as its evaluation on the test set found them.

    It says so, once, if the run recorded another accuracy on as many images: then they may be other images.
    """
    own, (name,) = student.description, found.names
    recorded, now = own.metrics.get("top1"), found[f"{name}/top1"]
    if own.evaluated_on == "test" and recorded is not None:
        images = abs(now - recorded) / 100 * found.examples
        if found.examples != own.examples or images > OTHER_DEVICE * found.examples + 0.5:
            logger.warning(
                f"student {own.student} has {now:.2f} % top-1 on {found.examples:,} test images, its run recorded "
                f"{recorded:.2f} % on {own.examples:,}: are they the same images?"
            )
    by_class = {
        label: ClassScores(int(scores.pop("images")), **scores)
        for label, scores in found.of_classes(name).items()
    }
    return dataclasses.replace(student, description=dataclasses.replace(own, by_class=by_class))


def config_of(student: LoadedStudent) -> FrozenConfigDict:
    """Return a configuration with the data that an extracted student was made for."""
    own = student.description
    images = own.preprocessing
    knobs = {"mean": images.mean, "std": images.std, "fit": images.fit, "image_size": images.image_size}
    knobs |= {"name": own.provenance.data, "test_split": own.provenance.test_split}
    return resolve({"data": knobs, "imports": own.network.imports})


def with_data(
    config: FrozenConfigDict, changes: Mapping[str, str | None], input_shape: tuple[int, int, int]
) -> FrozenConfigDict:
    """Return the configuration with other data to evaluate on.

    Args:
        config: a complete configuration.
        changes: knobs of the section `data`: `data_dir`, `manual_dir`, `name`, `test_split`, `corrupt`; an empty
            value changes nothing, except that an empty `test_split` stands for the usual one. With another name,
            the knobs that choose images of the old set are set to their defaults, and images of another size are
            resized.
        input_shape: H, W, C of the network's input.

    Raises:
        UserError: there is no such set, or its images cannot be brought to the network's input.
    """
    changes = {k: v for k, v in changes.items() if v or (k == "test_split" and v is not None)}
    changed = ConfigDict(config)
    if changes.get("name", config.data.name) != config.data.name:
        changed.data.update({knob: KNOBS[f"data.{knob}"].default for knob in OF_ONE_SET})
        if input_shape[0] == input_shape[1]:
            changed.data.image_size = input_shape[0]
            changed.data.fit = "crop" if config.data.fit == "crop" else "stretch"
    changed.data.update(changes)
    return resolve(changed)
