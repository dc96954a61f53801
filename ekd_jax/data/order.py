"""The order of training examples: a fresh permutation each epoch, one endless stream.

Batches are cut from the stream of epochs without a gap, so every example is seen exactly once an
epoch and a batch may straddle two. Everything here is a function of its arguments, from the raw
output of a generator whose stream NumPy guarantees: the order is the same for any number of devices,
processes and workers, on any machine, and resuming needs the step alone.
"""

import functools

import numpy as np

_HELD_OUT = 2**64 - 1  # in place of an epoch
_CUT = 1  # counter of what is drawn for examples
DRAWS = 40
_BLOCK = 256  # places that are drawn for together


@functools.lru_cache(maxsize=2)  # batches may straddle two epochs
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The numbers of all examples in the order of an epoch, (examples,) int32."""
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(examples)
    order = np.argsort(raw, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


def held_out_last(examples: int) -> np.ndarray:
    """A fixed order of the examples, whose end is held out; the same for every seed."""
    return epoch_order(0, _HELD_OUT, examples)


def position(step: int, batch_size: int, examples: int) -> tuple[int, int]:
    """(epoch, offset within it) of the first example of `step`."""
    return divmod(step * batch_size, examples)


def draws(seed: int, place: int) -> np.ndarray:
    """DRAWS random numbers in [0, 1) for the example at a place in the stream, wherever it is read."""
    block, row = divmod(place, _BLOCK)
    return _draws_of_block(seed, block)[row]


@functools.lru_cache(maxsize=64)  # threads read several batches at a time
def _draws_of_block(seed: int, block: int) -> np.ndarray:
    bits = np.random.Philox(key=np.array([seed, block], np.uint64), counter=[0, 0, 0, _CUT])
    return (bits.random_raw(_BLOCK * DRAWS) >> np.uint64(11)).reshape(_BLOCK, DRAWS) / 2.0**53
