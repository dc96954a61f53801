"""The order of training examples: a fresh permutation for each epoch, joined to one endless sequence.

Batches are cut from this sequence without a gap, so every example is seen exactly once per epoch and a batch
may straddle two epochs. With a balanced sampler an epoch is as long, but examples are drawn with replacement.
Everything here is a function of its arguments, computed from the raw output of a
generator whose stream NumPy guarantees: the order is the same for any number of devices, processes and workers,
on any machine, and resuming needs nothing but the step.
"""

import functools

import numpy as np

DRAWS = 40  # random numbers per example
_HOLDOUT_EPOCH = 2**64 - 1  # stands in for an epoch when examples are held out
_CROP_COUNTER = 1  # start of the generator's counter for random numbers of examples
_BALANCED_COUNTER = 2  # and for drawing examples with replacement
_BLOCK = 256  # positions whose random numbers are drawn together


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Return the numbers of all examples in the order of an epoch, (examples,) int32."""
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(examples)
    order = np.argsort(raw, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


class Sampler:
    """The order in which a run sees its training examples.

    Args:
        seed: of the run.
        examples: number N of training examples.
        labels: (N,) integers, to draw examples so that all classes that occur are equally likely. None: each
            example once per epoch.
    """

    def __init__(self, seed: int, examples: int, labels: np.ndarray | None = None):
        self._seed, self._examples = seed, examples
        self._by_class: np.ndarray | None = None
        if labels is not None:
            self._by_class = np.argsort(labels, kind="stable").astype(np.int32)
            _, self._first, self._number = np.unique(
                labels[self._by_class], return_index=True, return_counts=True
            )

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the numbers of the examples of an epoch in their order, (N,) int32."""
        if self._by_class is None:
            return epoch_order(self._seed, epoch, self._examples)
        return _balanced_order(self, epoch)

    def draw(self, epoch: int) -> np.ndarray:
        """Draw N examples with replacement: first a class, then one of its examples.

        This is how PyTorch's WeightedRandomSampler draws with weights of 1 / (examples of the class).
        """
        assert self._by_class is not None
        key = np.array([self._seed, epoch], np.uint64)
        raw = np.random.Philox(key=key, counter=[0, 0, 0, _BALANCED_COUNTER]).random_raw(2 * self._examples)
        classes = raw[: self._examples] % np.uint64(len(self._number))
        within = raw[self._examples :] % self._number[classes].astype(np.uint64)
        drawn = self._by_class[self._first[classes] + within.astype(np.int64)]
        drawn.flags.writeable = False
        return drawn


@functools.lru_cache(maxsize=2)
def _balanced_order(sampler: Sampler, epoch: int) -> np.ndarray:
    return sampler.draw(epoch)


def holdout_order(examples: int) -> np.ndarray:
    """Return a fixed permutation (examples,) int32 whose end is held out; the same for every seed."""
    return epoch_order(0, _HOLDOUT_EPOCH, examples)


def epoch_and_offset(step: int, batch_size: int, examples: int) -> tuple[int, int]:
    """Return the epoch of the first example of a step, and its offset in that epoch."""
    return divmod(step * batch_size, examples)


def crop_draws(seed: int, position: int) -> np.ndarray:
    """Return the random numbers (DRAWS,) in [0, 1) for the example at a position in the endless sequence."""
    block, row = divmod(position, _BLOCK)
    return _draws_of_block(seed, block)[row]


@functools.lru_cache(maxsize=64)  # threads read several batches at a time
def _draws_of_block(seed: int, block: int) -> np.ndarray:
    generator = np.random.Philox(key=np.array([seed, block], np.uint64), counter=[0, 0, 0, _CROP_COUNTER])
    return (generator.random_raw(_BLOCK * DRAWS) >> np.uint64(11)).reshape(_BLOCK, DRAWS) / 2.0**53
