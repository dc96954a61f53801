"""A data set that is read from disk while it is used, through Grain."""

import collections
import concurrent.futures
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.data import order
from ekd_jax.data.dataset import Examples
from ekd_jax.data.opening import Data, read_one

Array = jax.Array
AHEAD = 2  # batches that wait on the devices
THREADS_PER_PROCESS = 8  # more of them wait for Python's lock


class Part:
    """One process's part of the batches, by their number from 0, for Grain; sent to worker processes.

    Args:
        data: what is read.
        examples: of it.
        batch_size: over all processes.
        rows: this process's part of each batch.
        first: number of the first batch.
        batches: how many, the first included.
        seed: orders the examples and draws the cuts; None for evaluation: each example once, in order,
            and zeros where the last batch has none left.
    """

    def __init__(
        self,
        data: Data,
        examples: Examples,
        batch_size: int,
        rows: slice,
        first: int,
        batches: int,
        seed: int | None,
    ):
        self._facts, self._reader, self._examples = data.facts, data.reader, examples
        self._batch_size, self._rows, self._seed = batch_size, rows, seed
        self._first, self._batches = first, batches

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, batch: int) -> tuple[np.ndarray, ...]:
        """Images (rows, H, W, C) uint8, labels (rows,) int32 and for training numbers (rows,) int32."""
        size = self._rows.stop - self._rows.start
        images = np.empty((size, *self._facts.input_shape), np.uint8)
        labels, numbers = np.empty(size, np.int32), np.empty(size, np.int32)
        begin, count = (self._first + batch) * self._batch_size + self._rows.start, len(self._examples)
        there = size if self._seed is not None else max(0, min(size, count - begin))
        images[there:], labels[there:] = 0, 0
        for row in range(there):
            place, draws = begin + row, None
            numbers[row] = place
            if self._seed is not None:
                epoch, offset = divmod(place, count)
                numbers[row] = order.epoch_order(self._seed, epoch, count)[offset]
                draws = order.draws(self._seed, place)
            number = int(numbers[row])
            images[row], labels[row] = read_one(self._examples, self._reader, self._facts, number, draws)
        return (images, labels) if self._seed is None else (images, labels, numbers)


def workers_and_threads(config: Any) -> tuple[int, int]:
    """Worker processes and threads in each, 0 processes for threads alone."""
    cores = len(os.sched_getaffinity(0))
    few = cores <= THREADS_PER_PROCESS
    workers = (
        config.data.workers if config.data.workers >= 0 else 0 if few else -(-cores // THREADS_PER_PROCESS)
    )
    return workers, config.data.threads or -(-cores // max(1, workers))


class Batches:
    """Global batches on the devices, one after the other, read ahead.

    Args:
        config: resolved.
        part: this process's part of them.
        mesh: devices that share a batch.
        batch_size: over all processes.
    """

    def __init__(self, config: Any, part: Part, mesh: Mesh, batch_size: int):
        workers, threads = workers_and_threads(config)
        sharding = parallel.split(mesh)

        def to_devices(batch: tuple[np.ndarray, ...]) -> tuple[Array, ...]:
            return tuple(
                jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
                for rows in batch
            )

        read = grain.MapDataset.source(part).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + AHEAD)
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain asks for a flag of its own, also outside of commands
                flags.FLAGS.mark_as_parsed()
            several = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
            read = read.mp_prefetch(several, _live_and_die_with_the_run)
        self._iterator = iter(read.map(to_devices))
        # Grain's own prefetching thread does not tell whether a batch is there.
        self._left = len(part)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._ahead: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
        for _ in range(AHEAD):
            self._read_ahead()

    def _read_ahead(self) -> None:
        if self._left:
            self._left -= 1
            self._ahead.append(self._thread.submit(next, self._iterator))

    def ready(self) -> bool:
        """Whether the next one is there."""
        return bool(self._ahead) and self._ahead[0].done()

    def __next__(self) -> tuple[Array, ...]:
        batch = self._ahead.popleft()
        self._read_ahead()
        try:
            found: tuple[Array, ...] = batch.result()
            return found
        except Exception as error:  # in a worker process Grain wraps what was raised there
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise UserError(str(cause)) from error

    def close(self) -> None:
        """Ends threads and processes."""
        self._thread.shutdown(cancel_futures=True)
        self._ahead.clear()
        self._iterator.close()
        del self._iterator
        gc.collect()  # memory shared with worker processes hangs in cycles


class Streamed:
    """A training set that is read while training."""

    def __init__(self, config: Any, data: Data, mesh: Mesh, steps: int):
        self._config, self._data, self._mesh, self._steps = config, data, mesh, steps
        self._batch_size = config.train.batch_size
        self._batches: Batches | None = None
        self._step, self._held = -1, None  # type: int, Any

    def most(self) -> int:
        return 1

    def ready(self, step: int) -> bool:
        if step == self._step:
            return True
        return self._batches is not None and step == self._step + 1 and self._batches.ready()

    def at(self, step: int) -> Any:
        if step != self._step:
            if self._batches is None or step != self._step + 1:
                self._batches = self._open(step)
            self._held = next(self._batches)
            self._step = step
        return self._held

    def pick(self, held: Any, i: Array) -> tuple[Array, Array, Array]:
        images, labels, numbers = held
        return images, labels, numbers

    @property
    def shapes(self) -> Any:
        return _shapes(self._mesh, self._batch_size, self._data.facts.input_shape, numbers=True)

    def close(self) -> None:
        if self._batches is not None:
            self._held = None
            self._batches.close()
            self._batches = None

    def _open(self, step: int) -> Batches:
        self.close()
        rows = parallel.own_rows(parallel.split(self._mesh), self._batch_size)
        left, seed = self._steps - step, self._config.seed
        part = Part(self._data, self._data.train, self._batch_size, rows, step, left, seed)
        return Batches(self._config, part, self._mesh, self._batch_size)


class StreamedEvaluation:
    """A set to measure on that is read each time."""

    def __init__(self, config: Any, data: Data, examples: Examples, mesh: Mesh, name: str):
        self.name, self.examples = name, len(examples)
        self._config, self._data, self._source, self._mesh = config, data, examples, mesh
        self._batch_size = evaluation_batch(config, self.examples, mesh)

    def chunks(self) -> Iterator[tuple[Array, Array, int]]:
        rows = parallel.own_rows(parallel.split(self._mesh), self._batch_size)
        number = -(-self.examples // self._batch_size)
        part = Part(self._data, self._source, self._batch_size, rows, 0, number, None)
        read = Batches(self._config, part, self._mesh, self._batch_size)
        try:
            for i in range(number):
                images, labels = next(read)
                yield images, labels, min(self._batch_size, self.examples - i * self._batch_size)
        finally:
            read.close()

    @property
    def shapes(self) -> Any:
        return _shapes(self._mesh, self._batch_size, self._data.facts.input_shape, numbers=False)


def evaluation_batch(config: Any, examples: int, mesh: Mesh) -> int:
    """Examples of a batch of evaluation that all devices share alike."""
    return -(-min(config.evaluate.batch_size, examples) // mesh.size) * mesh.size


def _live_and_die_with_the_run(worker: int, workers: int) -> None:
    """In a worker process, which gets a terminal's Ctrl-C, too, but not the SIGKILL of its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _shapes(mesh: Mesh, batch_size: int, input_shape: tuple[int, ...], numbers: bool) -> Any:
    def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.split(mesh))

    images = of((batch_size, *input_shape), jnp.uint8)
    return images, *[of((batch_size,), jnp.int32)] * (2 if numbers else 1)
