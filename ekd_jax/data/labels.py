"""The labels of a training set, and what follows from how often each class occurs."""

import concurrent.futures
import os
from collections.abc import Sequence

import numpy as np
from ml_collections import FrozenConfigDict

from ekd_jax.common.cache import Cache
from ekd_jax.common.errors import UserError, nearest
from ekd_jax.common.progress import Progress
from ekd_jax.data.dataset import Examples, Facts, Subset, check_label
from ekd_jax.data.opening import Data
from ekd_jax.data.order import Sampler

BALANCED = "balanced"
LABELS = Cache("labels")


def make_sampler(config: FrozenConfigDict, data: Data) -> Sampler:
    """Return the order of the training examples that `data.sampler` asks for.

    Raises:
        UserError: a label is out of range.
    """
    labels = labels_of(data.train, data.facts) if config.data.sampler == BALANCED else None
    return Sampler(config.seed, len(data.train), labels)


def make_class_weights(config: FrozenConfigDict, data: Data) -> np.ndarray | None:
    """Return the weight of each class in the cross entropy, (K,) float32; None without `train.class_weights`.

        balanced: w_k = n / (K n_k)

    for n training examples, of which n_k are of class k.

    Raises:
        UserError: a class is unknown, or has no training example to balance.

    References:
        scikit-learn, compute_class_weight("balanced").
    """
    asked, names = config.train.class_weights, data.facts.class_names
    if not asked:
        return None
    if asked != (BALANCED,):
        return named_weights(asked, names)
    labels = labels_of(data.train, data.facts)
    counts = np.bincount(labels, minlength=len(names))
    if not counts.all():
        missing = names[int(counts.argmin())]
        raise UserError(
            f"train.class_weights=balanced: the class {missing!r} has no training example: add some, remove the "
            f"class, or give the weights by name"
        )
    return (len(labels) / (len(names) * counts)).astype(np.float32)


def check_class_weights(config: FrozenConfigDict, facts: Facts) -> None:
    """Raise UserError if `train.class_weights` names a class that the set does not have; no label is read."""
    if config.train.class_weights != (BALANCED,):
        named_weights(config.train.class_weights, facts.class_names)


def named_weights(asked: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    """Return the weight of each class, (K,) float32, from texts "class=weight"; the others weigh 1.

    Raises:
        UserError: a class is unknown or named twice.
    """
    weights = dict.fromkeys(class_names, 1.0)
    given = [text.rpartition("=")[::2] for text in asked]
    for name, weight in given:
        if name not in weights:
            raise UserError(f"train.class_weights: there is no class {name!r}{nearest(name, class_names)}")
        weights[name] = float(weight)
    repeated = [name for i, (name, _) in enumerate(given) if name in dict(given[:i])]
    if repeated:
        raise UserError(f"train.class_weights names the class {repeated[0]!r} twice")
    return np.array([weights[name] for name in class_names], np.float32)


def labels_of(examples: Examples, facts: Facts) -> np.ndarray:
    """Return the label of every example, (N,) int32.

    Sets that know them have an attribute `labels`. Otherwise each example is read once, but not decoded, and
    the cache remembers the labels.

    Raises:
        UserError: a label is out of range.
    """
    labels = _known_labels(examples)
    if labels is None:
        found = LABELS.load(examples.fingerprint)
        if found is None:
            found = {"labels": _read_labels(examples)}
            LABELS.store(examples.fingerprint, found)
        labels = found["labels"]
    for number in np.flatnonzero((labels < 0) | (labels >= facts.num_classes))[:1]:
        check_label(examples[int(number)], facts)
    return labels.astype(np.int32)


def _known_labels(examples: Examples) -> np.ndarray | None:
    if isinstance(examples, Subset):
        labels = _known_labels(examples.examples)
        return None if labels is None else labels[examples.numbers]
    known = getattr(examples, "labels", None)
    return None if known is None else np.asarray(known)


def _read_labels(examples: Examples) -> np.ndarray:
    progress = Progress("reading labels", len(examples), unit="images")
    labels = np.empty(len(examples), np.int64)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for number, example in enumerate(threads.map(examples.__getitem__, range(len(examples)))):
            labels[number] = example.label
            progress.add(1)
    progress.finish()
    return labels
