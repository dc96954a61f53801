"""Augmentation and normalization, on the device, as functions of (key, example) alone."""

import enum
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ekd_jax.data import policies

Array = jax.Array


class Purpose(enum.IntEnum):
    """What a random number is for. Each has keys of its own, so that none changes the others' draws."""

    ROTATION = 0
    CROP = 1
    FLIP = 2
    POLICY = 3
    CUTOUT = 4
    MIXUP = 5
    NETWORK = 6  # what the network drops and the method draws
    VIEW = 7  # and above: of further views of the images, one a student


def training_batch(
    key: Array, images: Array, labels: Array, examples: Array, num_classes: int, data: Any
) -> tuple[Array, Array]:
    """What the network is given for a step: images augmented and normalized, and their targets.

    Args:
        key: of the step. Each image's own keys are folded in from its example number, so that the
            result does not depend on where in the batch, or on which device, the image is; mixup
            alone also takes in the image that follows in the batch.
        images: (B, H, W, C) uint8.
        labels: (B,) integers.
        examples: (B,) integers, numbers of the examples in the training set.
        num_classes: K.
        data: the configuration's section.

    Returns:
        Images (B, H, W, C) float32, and the labels as they came, or with mixup or label smoothing the
        classes' probabilities (B, K) float32.
    """
    images = normalize(augment(key, images, examples, data), data.mean, data.std)
    if data.cutout:
        images = cutout(key, images, examples, data.cutout)
    if not (data.mixup or data.label_smoothing):
        return images, labels
    targets = soften(labels, num_classes, data.label_smoothing)
    if data.mixup:
        images, targets = mixup(key, images, targets, examples, data.mixup)
    return images, targets


def augment(key: Array, images: Array, examples: Array, data: Any) -> Array:
    """Pads, rotates, crops, flips, and follows a policy, as far as `data` asks for it.

    The order is that of torchvision's Pad, RandomAffine, RandomCrop, RandomHorizontalFlip, RandAugment.

    Args:
        key: of the step.
        images: (B, H, W, C) uint8.
        examples: (B,) integers, numbers of the examples in the training set.
        data: the configuration's section.

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
    """(images / 255 - mean) / std in float32; mean and std of one value, or one a channel."""
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def cutout(key: Array, images: Array, examples: Array, size: int) -> Array:
    """Sets a square to 0, the mean of normalized images (DeVries & Taylor 2017).

    The square's middle is any pixel, all equally likely; what lies outside the image is cut off. As in
    the official code it begins size // 2 before that pixel; there an odd size loses its last line.

    Args:
        key: of the step.
        images: (B, H, W, C).
        examples: (B,) integers, numbers of the examples in the training set.
        size: side of the square in pixels.

    Returns:
        Images of the same shape and dtype.
    """
    height, width = images.shape[1:3]

    def hole(key: Array) -> Array:
        center = jax.random.randint(key, (2,), 0, jnp.array([height, width]))
        place = jnp.indices((height, width)) - (center - size // 2)[:, None, None]
        return ((place >= 0) & (place < size)).all(0)

    holes = jax.vmap(hole)(_keys(key, examples, Purpose.CUTOUT))
    return jnp.where(holes[..., None], 0, images)


def mixup(key: Array, images: Array, targets: Array, examples: Array, alpha: float) -> tuple[Array, Array]:
    """Mixes every image, and its target, with the next of the batch (Zhang et al. 2018, equation 1).

    The share that an image keeps is drawn from Beta(alpha, alpha) for each; the official code draws one
    for the whole batch. The order of a batch is random, and so are the pairs.

    Args:
        key: of the step.
        images: (B, H, W, C) floats.
        targets: (B, K) floats, the classes' probabilities.
        examples: (B,) integers, numbers of the examples in the training set.
        alpha: above 0.

    Returns:
        Images and targets of the same shapes and dtypes.
    """
    shares = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(_keys(key, examples, Purpose.MIXUP))

    def mix(batch: Array) -> Array:
        share = shares.reshape(-1, *[1] * (batch.ndim - 1))
        return share * batch + (1 - share) * jnp.roll(batch, -1, axis=0)

    return mix(images), mix(targets)


def soften(labels: Array, num_classes: int, smoothing: float) -> Array:
    """Targets (B, K) float32 of labels (B,): (1 - smoothing) of the label's class, the rest of all K alike.

    Szegedy et al. 2016, section 7, as `label_smoothing` of PyTorch's cross-entropy does it.
    """
    return (1 - smoothing) * jax.nn.one_hot(labels, num_classes) + smoothing / num_classes


def _rotate(keys: Array, images: Array, most: float) -> Array:
    """Turns (B, H, W, C) about the center by one of 1001 angles, evenly spaced up to `most` degrees."""
    # A finite number, to compute the maps in double precision beforehand: all devices turn alike.
    maps = jnp.asarray(policies.rotation_map(np.linspace(-most, most, 1001), *images.shape[1:3]))
    turns = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(maps)))(keys)
    return jax.vmap(policies.warp)(images, maps[turns])


def _keys(key: Array, examples: Array, purpose: Purpose) -> Array:
    """(B,) keys, one an example."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, purpose), examples)
