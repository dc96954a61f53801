"""A data set that stays in the devices' memory, as uint8."""

import concurrent.futures
import os
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.cache import Cache
from ekd_jax.data import order
from ekd_jax.data.dataset import Examples, cache_key
from ekd_jax.data.labels import make_sampler
from ekd_jax.data.opening import Data, read_example

Array = jax.Array
# CIFAR's 60,000 PNGs take 17 s to decode on two cores, their pixels half a second to read.
PIXELS = Cache("pixels", max_bytes=4e9)
CACHE_SECONDS = 2.0  # pixels that took longer to read are cached
EXAMPLES_PER_TASK = 256  # that a thread reads in one go


class Resident:
    """A training set on the devices, where batches are gathered."""

    def __init__(self, config: FrozenConfigDict, data: Data, mesh: Mesh, placement: str):
        self._mesh, self._batch_size = mesh, config.train.batch_size
        self._sampler = make_sampler(config, data)
        self._examples = len(data.train)
        self._images, self._labels = place_on_devices(data.train, data, mesh, placement)
        self._epoch = -1  # the epoch that `_order` begins with
        self._order: Array

    def max_steps(self) -> int:
        """Return the largest number of steps that one dispatch may take."""
        return self._examples // self._batch_size  # `load` gives the order of two epochs

    def is_ready(self, step: int) -> bool:
        """Return True: nothing has to be waited for."""
        return True

    def load(self, step: int) -> tuple[Array, ...]:
        """Return all images and labels, the order of the examples from this epoch on, and the step's offset."""
        epoch, offset = order.epoch_and_offset(step, self._batch_size, self._examples)
        if epoch != self._epoch:
            two = [self._sampler.epoch(e) for e in (epoch, epoch + 1)]
            self._epoch, self._order = epoch, parallel.replicate(self._mesh, np.concatenate(two))
        return self._images, self._labels, self._order, parallel.replicate(self._mesh, np.int32(offset))

    def select_batch(self, loaded: tuple[Array, ...], i: Array) -> tuple[Array, Array, Array]:
        """Gather batch `i` after the step that was loaded; traced."""
        return gather_batch(self._mesh, self._batch_size, loaded, i)

    @property
    def shapes(self) -> tuple[Array, ...]:
        """Arrays like those that `load` returns."""
        return self.load(0)

    def close(self) -> None:
        """Do nothing: there are no threads or processes."""


def gather_batch(
    mesh: Mesh, batch_size: int, loaded: tuple[Array, ...], i: Array
) -> tuple[Array, Array, Array]:
    """Gather batch `i` of what `Resident.load` returns; traced."""
    images, labels, numbers, offset = loaded
    chosen = lax.dynamic_slice(numbers, (offset + i * batch_size,), (batch_size,))
    chosen = lax.with_sharding_constraint(chosen, parallel.split(mesh))
    return images[chosen], labels[chosen], chosen


class ResidentEvaluation:
    """A set to evaluate on that stays on the devices, in one chunk."""

    def __init__(self, name: str, examples: int, images: Array, labels: Array):
        self.name, self.examples = name, examples
        self.shapes = (images, labels)

    def chunks(self) -> Iterator[tuple[Array, Array, int]]:
        """Yield all images and labels, and the number of examples."""
        yield *self.shapes, self.examples


def place_on_devices(examples: Examples, data: Data, mesh: Mesh, placement: str) -> tuple[Array, Array]:
    """Return all images (N, H, W, C) uint8 and labels (N,) int32 on the devices.

    With placement "sharded", N is padded with zeros to a multiple of the number of devices, and each process
    reads only the examples of its own devices.
    """
    sharded = placement == "sharded"
    sharding = parallel.split(mesh) if sharded else parallel.replicated(mesh)
    count = -(-len(examples) // mesh.size) * mesh.size if sharded else len(examples)
    own = parallel.own_rows(sharding, count)
    images, labels = read_pixels(examples, data, range(own.start, min(own.stop, len(examples))))
    missing = own.stop - own.start - len(labels)
    images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else images
    labels = np.pad(labels, (0, missing)) if missing else labels

    def place(rows: np.ndarray) -> Array:
        def cut(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first, last, _ = index[0].indices(count)
            return rows[first - own.start : last - own.start]

        return jax.make_array_from_callback((count, *rows.shape[1:]), sharding, cut)

    return place(images), place(labels)


def read_pixels(examples: Examples, data: Data, numbers: range) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, H, W, C) uint8 and labels (N,) int32 of the examples with these numbers.

    As many threads as there are cores read them. Pixels that took long are cached for the next run.
    """
    key = f"{cache_key(examples)} {data.reader} {data.facts.num_classes} {numbers}"
    found = PIXELS.load(key)
    if found is not None:
        return found["images"], found["labels"]
    started = time.monotonic()
    images = np.empty((len(numbers), *data.facts.input_shape), np.uint8)
    labels = np.empty(len(numbers), np.int32)

    def read_some(start: int) -> None:
        for row in range(start, min(start + EXAMPLES_PER_TASK, len(numbers))):
            images[row], labels[row] = read_example(examples, data.reader, data.facts, numbers[row])

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(read_some, range(0, len(numbers), EXAMPLES_PER_TASK)))
    if time.monotonic() - started > CACHE_SECONDS and images.nbytes < PIXELS.max_bytes / 2:
        PIXELS.store(key, {"images": images, "labels": labels})
    return images, labels
