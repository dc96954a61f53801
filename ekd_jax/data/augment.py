"""Augmentation and normalisation, on the device, as functions of (key, example) alone."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def augment(key: Array, images: Array, examples: Array, padding: int, flip: bool) -> Array:
    """Zero-pad and random crop, then a horizontal flip of half the images.

    Args:
        key: of the step. Each image's own key is folded in from its example number, so that the
            result does not depend on where in the batch, or on which device, the image is.
        images: (B, H, W, C) of any dtype.
        examples: (B,) integers, numbers of the examples in the training set.
        padding: pixels on every side, 0 for no crop.
        flip: whether to flip.

    Returns:
        Images of the same shape and dtype.
    """

    def one(key: Array, image: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        if padding:
            padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
            top, left = jax.random.randint(crop_key, (2,), 0, 2 * padding + 1)
            image = lax.dynamic_slice(padded, (top, left, 0), image.shape)
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, examples)
    return jax.vmap(one)(keys, images)


def normalise(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """(images / 255 - mean) / std in float32; mean and std of one value, or one a channel."""
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
