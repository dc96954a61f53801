"""The order of training examples: a fresh permutation each epoch, one endless stream.

Batches are cut from the stream of epochs without a gap, so every example is seen exactly once an
epoch and a batch may straddle two. The stream is a function of the seed; resuming needs the step.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def two_epochs(key: Array, epoch: Array, examples: int) -> Array:
    """The orders of `epoch` and the one after it, (2 * examples,) int32."""

    def order(epoch: Array) -> Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), examples)

    return jnp.concatenate([order(epoch), order(epoch + 1)])


def position(step: int, batch_size: int, examples: int) -> tuple[int, int]:
    """(epoch, offset within it) of the first example of `step`."""
    return divmod(step * batch_size, examples)
