"""Augmentation and normalization on the device.

The result for an image is a function of the step's key and the number of the example alone (mixup also uses the
next image of the batch). It does not depend on where in the batch, or on which device, the image is.
"""

import enum
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ekd_jax.data import policies

if TYPE_CHECKING:  # a student that predicts needs no configuration
    from ml_collections import FrozenConfigDict

Array = jax.Array


class Purpose(enum.IntEnum):
    """The use of a random number. Each use has its own keys, so that none changes the draws of another."""

    ROTATION = 0
    CROP = 1
    FLIP = 2
    POLICY = 3
    CUTOUT = 4
    MIXUP = 5
    NETWORK = 6  # dropout in the network, and random numbers of the method
    VIEW = 7  # and above: further views of the images, one per student


def training_batch(
    key: Array, images: Array, labels: Array, examples: Array, num_classes: int, data: "FrozenConfigDict"
) -> tuple[Array, Array]:
    """Return the network's input for a step: augmented and normalized images, and their targets.

    Args:
        key: random key of the step; each image's own keys are derived from it and its example number.
        images: (B, H, W, C) uint8.
        labels: (B,) integers.
        examples: (B,) integers, numbers of the examples in the training set.
        num_classes: number of classes K.
        data: the section `data` of the configuration.

    Returns:
        Images (B, H, W, C) float32, and either the unchanged labels (B,) or, with mixup or label smoothing,
        class probabilities (B, K) float32.
    """
    images = normalize(augment(key, images, examples, data), data.mean, data.std)
    if data.cutout:
        images = cutout(key, images, examples, data.cutout)
    if not (data.mixup or data.label_smoothing):
        return images, labels
    targets = smooth_labels(labels, num_classes, data.label_smoothing)
    if data.mixup:
        images, targets = mixup(key, images, targets, examples, data.mixup)
    return images, targets


def augment(key: Array, images: Array, examples: Array, data: "FrozenConfigDict") -> Array:
    """Pad, rotate, crop and flip images and apply a policy, as far as the configuration asks for it.

    The order is that of torchvision's Pad, RandomAffine, RandomCrop, RandomHorizontalFlip, RandAugment.

    Args:
        key: random key of the step.
        images: (B, H, W, C) uint8.
        examples: (B,) integers, numbers of the examples in the training set.
        data: the section `data` of the configuration.

    Returns:
        Images of the same shape and dtype.
    """
    _, height, width, channels = images.shape
    padding = data.crop_padding
    if padding:
        mode = {"zero": "constant", "reflect": "reflect"}[data.padding_mode]
        images = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode)
    if data.rotation:
        images = _rotate(_keys(key, examples, Purpose.ROTATION), images, data.rotation)
    if padding:

        def crop(key: Array, padded: Array) -> Array:
            top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
            return lax.dynamic_slice(padded, (top, left, 0), (height, width, channels))

        images = jax.vmap(crop)(_keys(key, examples, Purpose.CROP), images)
    if data.flip:
        flipped = jax.vmap(jax.random.bernoulli)(_keys(key, examples, Purpose.FLIP))
        images = jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    if data.policy == "randaugment":
        policy = partial(
            policies.randaugment, operations=data.policy_operations, level=data.policy_magnitude
        )
        images = jax.vmap(policy)(_keys(key, examples, Purpose.POLICY), images)
    if data.policy == "trivialaugment":
        images = jax.vmap(policies.trivialaugment)(_keys(key, examples, Purpose.POLICY), images)
    return images


def normalize(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Return (images / 255 - mean) / std in float32; mean and std have one value, or one per channel."""
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def cutout(key: Array, images: Array, examples: Array, size: int) -> Array:
    """Set a square of each image to 0, the mean of normalized images (DeVries & Taylor 2017).

    The center of the square is drawn uniformly from all pixels; the part outside the image is cut off. As in the
    official code, the square starts size // 2 before its center; the official code leaves out the last row and
    column of a square of odd size.

    Args:
        key: random key of the step.
        images: (B, H, W, C), normalized.
        examples: (B,) integers, numbers of the examples in the training set.
        size: side of the square in pixels.

    Returns:
        Images of the same shape and dtype.
    """
    height, width = images.shape[1:3]

    def is_covered(key: Array) -> Array:
        center = jax.random.randint(key, (2,), 0, jnp.array([height, width]))
        place = jnp.indices((height, width)) - (center - size // 2)[:, None, None]
        return ((place >= 0) & (place < size)).all(0)

    covered = jax.vmap(is_covered)(_keys(key, examples, Purpose.CUTOUT))
    return jnp.where(covered[..., None], 0, images)


def mixup(key: Array, images: Array, targets: Array, examples: Array, alpha: float) -> tuple[Array, Array]:
    """Mix every image and its target with the next one of the batch (Zhang et al. 2018, equation 1).

    The share that an image keeps is drawn from Beta(alpha, alpha) for each image; the official code draws one
    share for the whole batch. The order of a batch is random, and so are the pairs.

    Args:
        key: random key of the step.
        images: (B, H, W, C) floats.
        targets: (B, K) floats, class probabilities.
        examples: (B,) integers, numbers of the examples in the training set.
        alpha: parameter of the Beta distribution, above 0.

    Returns:
        Images and targets of the same shapes and dtypes.
    """
    shares = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(_keys(key, examples, Purpose.MIXUP))

    def mix(batch: Array) -> Array:
        share = shares.reshape(-1, *[1] * (batch.ndim - 1))
        return share * batch + (1 - share) * jnp.roll(batch, -1, axis=0)

    return mix(images), mix(targets)


def smooth_labels(labels: Array, num_classes: int, smoothing: float) -> Array:
    """Return targets (B, K) float32 for labels (B,): (1 - smoothing) one_hot(labels) + smoothing / K.

    This is label smoothing (Szegedy et al. 2016, section 7), as in PyTorch's cross-entropy.
    """
    return (1 - smoothing) * jax.nn.one_hot(labels, num_classes) + smoothing / num_classes


def _rotate(keys: Array, images: Array, largest: float) -> Array:
    """Rotate images (B, H, W, C) about the center by one of 1001 evenly spaced angles up to `largest` degrees."""
    # There are finitely many, so the maps can be computed in double precision beforehand: all devices agree.
    maps = jnp.asarray(policies.rotation_map(np.linspace(-largest, largest, 1001), *images.shape[1:3]))
    turns = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(maps)))(keys)
    return jax.vmap(policies.warp)(images, maps[turns])


def _keys(key: Array, examples: Array, purpose: Purpose) -> Array:
    """Return the random keys (B,) of the examples for one purpose."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, purpose), examples)
