"""The order of training examples: a fresh permutation for each epoch, joined to one endless sequence.

Batches are cut from this sequence without a gap, so every example is seen exactly once per epoch and a batch
may straddle two epochs. Everything here is a function of its arguments, computed from the raw output of a
generator whose stream NumPy guarantees: the order is the same for any number of devices, processes and workers,
on any machine, and resuming needs nothing but the step.
"""

import functools

import numpy as np

DRAWS = 40  # random numbers per example
_HOLDOUT_EPOCH = 2**64 - 1  # stands in for an epoch when examples are held out
_CROP_COUNTER = 1  # start of the generator's counter for random numbers of examples
_BLOCK = 256  # positions whose random numbers are drawn together


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Return the numbers of all examples in the order of an epoch, (examples,) int32."""
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(examples)
    order = np.argsort(raw, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


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
