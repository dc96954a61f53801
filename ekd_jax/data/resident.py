"""A data set that lives on the devices, as uint8."""

import concurrent.futures
import hashlib
import os
import pathlib
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

from ekd_jax.common import parallel
from ekd_jax.common.files import user_cache
from ekd_jax.data import order
from ekd_jax.data.dataset import Examples
from ekd_jax.data.opening import Data, read_one

Array = jax.Array
CACHE_SECONDS, CACHE_BYTES = 2.0, 4e9  # what takes so long to read is kept, so much in all


class Resident:
    """A training set on the devices; batches are gathered there."""

    def __init__(self, config: Any, data: Data, mesh: Mesh, placement: str):
        self._mesh, self._seed, self._batch_size = mesh, config.seed, config.train.batch_size
        self._examples = len(data.train)
        self._images, self._labels = on_devices(data.train, data, mesh, placement)
        self._epoch, self._order = -1, None

    def most(self) -> int:
        return self._examples // self._batch_size  # `at` gives the order of two epochs

    def ready(self, step: int) -> bool:
        return True

    def at(self, step: int) -> Any:
        epoch, offset = order.position(step, self._batch_size, self._examples)
        if epoch != self._epoch:
            two = [order.epoch_order(self._seed, e, self._examples) for e in (epoch, epoch + 1)]
            self._epoch, self._order = epoch, parallel.replicate(self._mesh, np.concatenate(two))
        return self._images, self._labels, self._order, parallel.replicate(self._mesh, np.int32(offset))

    def pick(self, held: Any, i: Array) -> tuple[Array, Array, Array]:
        images, labels, numbers, offset = held
        chosen = lax.dynamic_slice(numbers, (offset + i * self._batch_size,), (self._batch_size,))
        chosen = lax.with_sharding_constraint(chosen, parallel.split(self._mesh))
        return images[chosen], labels[chosen], chosen

    @property
    def shapes(self) -> Any:
        return self.at(0)

    def close(self) -> None:
        pass


class ResidentEvaluation:
    """A set to measure on that lives on the devices, in one chunk."""

    def __init__(self, name: str, examples: int, images: Array, labels: Array):
        self.name, self.examples = name, examples
        self.shapes = (images, labels)

    def chunks(self) -> Iterator[tuple[Array, Array, int]]:
        yield *self.shapes, self.examples


def on_devices(examples: Examples, data: Data, mesh: Mesh, placement: str) -> tuple[Array, Array]:
    """All images (N, H, W, C) uint8 and labels (N,) int32.

    With "sharded" N is filled up with zeros to a multiple of the devices, and each process reads only
    what its own devices hold.
    """
    sharded = placement == "sharded"
    sharding = parallel.split(mesh) if sharded else parallel.replicated(mesh)
    count = -(-len(examples) // mesh.size) * mesh.size if sharded else len(examples)
    own = parallel.own_rows(sharding, count)
    images, labels = read_all(examples, data, range(own.start, min(own.stop, len(examples))))
    missing = own.stop - own.start - len(labels)
    images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else images
    labels = np.pad(labels, (0, missing)) if missing else labels

    def place(rows: np.ndarray) -> Array:
        def cut(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(count)
            return rows[first - own.start : last - own.start]

        return jax.make_array_from_callback((count, *rows.shape[1:]), sharding, cut)

    return place(images), place(labels)


def read_all(examples: Examples, data: Data, numbers: range) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the examples with these numbers.

    They are read by as many threads as there are cores. What took long is kept in the user's cache for
    the next run: CIFAR's 60,000 PNGs take 17 s on two cores, their pixels half a second.
    """
    what = f"{examples.fingerprint} {data.reader} {data.facts.num_classes} {numbers}"
    kept = user_cache() / f"pixels-{hashlib.sha256(what.encode()).hexdigest()[:24]}.npz"
    found = _recall(kept)
    if found is not None:
        return found
    started = time.monotonic()
    images = np.empty((len(numbers), *data.facts.input_shape), np.uint8)
    labels = np.empty(len(numbers), np.int32)

    def read(place: int) -> None:
        images[place], labels[place] = read_one(examples, data.reader, data.facts, numbers[place])

    def read_some(start: int) -> None:
        for place in range(start, min(start + 256, len(numbers))):
            read(place)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(read_some, range(0, len(numbers), 256)))
    if time.monotonic() - started > CACHE_SECONDS and images.nbytes < CACHE_BYTES / 2:
        _keep(kept, images, labels)
    return images, labels


def _recall(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray] | None:
    """What was kept, if it is there and whole: the archive has a checksum of each array."""
    try:
        with np.load(path) as arrays:
            found = arrays["images"], arrays["labels"]
        path.touch()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return found


def _keep(path: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes what `_recall` finds, and deletes what was not used for longest; a full disk is no error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, images=images, labels=labels)
        os.replace(partial, path)
        size = 0
        for old in sorted(path.parent.glob("pixels-*.npz"), key=lambda p: -p.stat().st_mtime):
            size += old.stat().st_size
            if size > CACHE_BYTES:
                old.unlink(missing_ok=True)
    except OSError:
        partial.unlink(missing_ok=True)
