"""A data set that is read from disk while it is used, through Grain."""

import collections
import concurrent.futures
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from absl import flags
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.data import order
from ekd_jax.data.arrays import in_memory
from ekd_jax.data.dataset import Examples
from ekd_jax.data.labels import make_sampler
from ekd_jax.data.opening import Data, read_example

Array = jax.Array
BATCHES_AHEAD = 2  # batches that wait on the devices
THREADS_PER_PROCESS = 8  # with more, threads wait for Python's lock


class ProcessBatches:
    """One process's rows of the batches, by batch number from 0; Grain sends it to worker processes.

    Args:
        data: facts and reader of the set.
        examples: those of the set that are read.
        batch_size: size of a batch, over all processes.
        rows: this process's rows of each batch.
        batches: numbers of the batches, in steps of 1.
        seed: draws the crops, and orders the examples. None for evaluation: each example once, in order, and
            zeros where the last batch has none left.
        sampler: orders the examples otherwise.
    """

    def __init__(
        self,
        data: Data,
        examples: Examples,
        batch_size: int,
        rows: slice,
        batches: range,
        seed: int | None,
        sampler: order.Sampler | None = None,
    ):
        self._facts, self._reader, self._examples = data.facts, data.reader, examples
        self._batch_size, self._rows, self._batches, self._seed = batch_size, rows, batches, seed
        self._sampler = sampler or order.Sampler(seed or 0, len(examples))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, batch: int) -> tuple[np.ndarray, ...]:
        """Return images (rows, H, W, C) uint8, labels (rows,) int32 and, for training, the numbers of the
        examples (rows,) int32."""
        size = self._rows.stop - self._rows.start
        images = np.empty((size, *self._facts.input_shape), np.uint8)
        labels, numbers = np.empty(size, np.int32), np.empty(size, np.int32)
        first, count = self._batches[batch] * self._batch_size + self._rows.start, len(self._examples)
        filled = size if self._seed is not None else max(0, min(size, count - first))
        images[filled:], labels[filled:] = 0, 0
        for row in range(filled):
            position, draws = first + row, None
            numbers[row] = position
            if self._seed is not None:
                epoch, offset = divmod(position, count)
                numbers[row] = self._sampler.epoch(epoch)[offset]
                draws = order.crop_draws(self._seed, position)
            images[row], labels[row] = read_example(
                self._examples, self._reader, self._facts, int(numbers[row]), draws
            )
        return (images, labels) if self._seed is None else (images, labels, numbers)

    @property
    def in_memory(self) -> bool:
        """True if the examples are arrays in memory."""
        return in_memory(self._examples)


def workers_and_threads(config: FrozenConfigDict, in_memory: bool = False) -> tuple[int, int]:
    """Return the number of worker processes, 0 for threads alone, and of threads in each.

    Unless `data.workers` says so, examples in memory are not copied to worker processes.
    """
    cores = len(os.sched_getaffinity(0))
    workers = config.data.workers
    if workers < 0:
        few = cores <= THREADS_PER_PROCESS
        workers = 0 if few or in_memory else -(-cores // THREADS_PER_PROCESS)
    return workers, config.data.threads or -(-cores // max(1, workers))


class Batches:
    """Global batches on the devices, one after the other, read ahead.

    Args:
        config: resolved configuration.
        source: this process's part of the batches.
        mesh: devices that share a batch.
        batch_size: size of a batch, over all processes.
    """

    def __init__(self, config: FrozenConfigDict, source: ProcessBatches, mesh: Mesh, batch_size: int):
        workers, threads = workers_and_threads(config, source.in_memory)
        sharding = parallel.split(mesh)

        def to_devices(batch: tuple[np.ndarray, ...]) -> tuple[Array, ...]:
            return tuple(
                jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
                for rows in batch
            )

        read = grain.MapDataset.source(source).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + BATCHES_AHEAD)
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain asks for a flag of its own, also outside of commands
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=BATCHES_AHEAD
            )
            read = read.mp_prefetch(options, _follow_the_parent)
        self._iterator = iter(read.map(to_devices))
        # Grain's own prefetching thread does not tell whether a batch is there.
        self._left = len(source)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._ahead: collections.deque[concurrent.futures.Future[tuple[Array, ...]]] = collections.deque()
        for _ in range(BATCHES_AHEAD):
            self._read_ahead()

    def _read_ahead(self) -> None:
        if self._left:
            self._left -= 1
            self._ahead.append(self._thread.submit(next, self._iterator))

    def is_ready(self) -> bool:
        """Return whether the next batch is there."""
        return bool(self._ahead) and self._ahead[0].done()

    def __next__(self) -> tuple[Array, ...]:
        batch = self._ahead.popleft()
        self._read_ahead()
        try:
            return batch.result()
        except Exception as error:  # Grain wraps what is raised in a worker process
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise UserError(str(cause)) from error

    def close(self) -> None:
        """End threads and processes."""
        self._thread.shutdown(cancel_futures=True)
        self._ahead.clear()
        self._iterator.close()
        del self._iterator
        gc.collect()  # reference cycles hold memory that is shared with worker processes


class Streamed:
    """A training set that is read while training."""

    def __init__(self, config: FrozenConfigDict, data: Data, mesh: Mesh, steps: int):
        self._config, self._data, self._mesh, self._steps = config, data, mesh, steps
        self._batch_size = config.train.batch_size
        self._batches: Batches | None = None
        self._step = -1  # the step whose batch is loaded
        self._loaded: tuple[Array, ...] = ()

    def max_steps(self) -> int:
        """Return 1: one batch is loaded at a time."""
        return 1

    def is_ready(self, step: int) -> bool:
        """Return whether the batch of a step has been read."""
        if step == self._step:
            return True
        return self._batches is not None and step == self._step + 1 and self._batches.is_ready()

    def load(self, step: int) -> tuple[Array, ...]:
        """Return the batch of a step: images, labels and numbers of the examples; waits for it."""
        if step != self._step:
            if self._batches is None or step != self._step + 1:
                self._batches = self._open(step)
            self._loaded = next(self._batches)
            self._step = step
        return self._loaded

    def select_batch(self, loaded: tuple[Array, ...], i: Array) -> tuple[Array, Array, Array]:
        """Return the batch that was loaded."""
        images, labels, numbers = loaded
        return images, labels, numbers

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arrays that `load` returns."""
        return _shapes(self._mesh, self._batch_size, self._data.facts.input_shape, numbers=True)

    def close(self) -> None:
        """End threads and processes."""
        if self._batches is not None:
            self._loaded = ()
            self._batches.close()
            self._batches = None

    def _open(self, step: int) -> Batches:
        self.close()
        rows = parallel.own_rows(parallel.split(self._mesh), self._batch_size)
        batches = range(step, self._steps)
        seed, sampler = self._config.seed, make_sampler(self._config, self._data)
        source = ProcessBatches(
            self._data, self._data.train, self._batch_size, rows, batches, seed, sampler
        )
        return Batches(self._config, source, self._mesh, self._batch_size)


class StreamedEvaluation:
    """A set to evaluate on that is read each time."""

    def __init__(self, config: FrozenConfigDict, data: Data, examples: Examples, mesh: Mesh, name: str):
        self.name, self.examples = name, len(examples)
        self._config, self._data, self._source, self._mesh = config, data, examples, mesh
        self._batch_size = evaluation_batch_size(config, self.examples, mesh)

    def chunks(self) -> Iterator[tuple[Array, Array, int]]:
        """Yield images and labels of each batch, and how many of them count."""
        rows = parallel.own_rows(parallel.split(self._mesh), self._batch_size)
        batches = range(-(-self.examples // self._batch_size))
        source = ProcessBatches(self._data, self._source, self._batch_size, rows, batches, None)
        read = Batches(self._config, source, self._mesh, self._batch_size)
        try:
            for i in batches:
                images, labels = next(read)
                yield images, labels, min(self._batch_size, self.examples - i * self._batch_size)
        finally:
            read.close()

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of a batch's images and labels."""
        return _shapes(self._mesh, self._batch_size, self._data.facts.input_shape, numbers=False)


def evaluation_batch_size(config: FrozenConfigDict, examples: int, mesh: Mesh) -> int:
    """Return the size of an evaluation batch that all devices share equally."""
    return -(-min(config.evaluate.batch_size, examples) // mesh.size) * mesh.size


def _follow_the_parent(worker: int, workers: int) -> None:
    """Make a worker process ignore signals and end with its parent.

    Workers would otherwise get a terminal's Ctrl-C, too, and outlive a parent that gets SIGKILL.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _shapes(
    mesh: Mesh, batch_size: int, input_shape: tuple[int, ...], numbers: bool
) -> tuple[jax.ShapeDtypeStruct, ...]:
    def struct(shape: tuple[int, ...], dtype: npt.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.split(mesh))

    images = struct((batch_size, *input_shape), jnp.uint8)
    return images, *[struct((batch_size,), jnp.int32)] * (2 if numbers else 1)
