"""The outputs of frozen teachers: computed for each batch, or read from a table computed once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ekd_jax.common import parallel
from ekd_jax.data.augment import normalize
from ekd_jax.data.feed import Feed
from ekd_jax.data.resident import Resident, read_pixels
from ekd_jax.methods.base import TeacherOutputs
from ekd_jax.runs.teachers import Teacher
from ekd_jax.training.setup import Setup

Array = jax.Array
Teach = Callable[[Any, Array, Array], tuple[TeacherOutputs, ...]]


def frozen_inputs(setup: Setup, feed: Feed) -> Any:
    """Return what `make_teach` needs on the devices, as numpy arrays.

    That is the variables of the teachers, `{"teachers": [...]}`. Where an image is the same in every epoch, the
    training set is on the devices and the method compares logits only, it is a table of the teachers' logits
    instead, computed once: `{"stored": (N, T, K) float32}`.
    """
    teachers, method = setup.teachers, setup.networks.method
    resident = isinstance(feed, Resident)
    if teachers and images_are_fixed(setup.config.data) and resident and not method.uses_teacher_maps:
        return {"stored": _all_logits(setup)}
    return {"teachers": [teacher.frozen for teacher in teachers]}


def images_are_fixed(data: Any) -> bool:
    """Return whether an image is the same in every epoch; `data` is that section of a configuration."""
    drawn = data.crop_padding or data.flip or data.rotation or data.cutout or data.mixup
    return not drawn and data.policy == "none" and data.fit != "crop"


def _all_logits(setup: Setup) -> np.ndarray:
    """Return the logits of all teachers for all training images, (N, T, K) float32."""
    teachers, number = setup.teachers, setup.examples
    size = min(setup.config.evaluate.batch_size, number)

    @jax.jit
    def say(frozen: Any, images: Array) -> Array:
        outputs = []
        for teacher, own in zip(teachers, frozen, strict=True):
            given = teacher.preprocessing
            outputs.append(teacher(own, normalize(images, given.mean, given.std)))
        return jnp.stack([given.logits for given in outputs], 1)

    images, _ = read_pixels(setup.data.train, setup.data, range(number))
    parts = []
    with jax.transfer_guard("allow"):
        frozen = jax.device_put([teacher.frozen for teacher in teachers])
        for first in range(0, number, size):
            places = np.arange(first, first + size).clip(max=number - 1)  # one shape, compiled once
            parts.append(np.asarray(say(frozen, images[places])))
    logits: np.ndarray = parallel.from_main(np.concatenate(parts)[:number])
    return logits


def make_teach(teachers: Sequence[Teacher], data: Any) -> Teach:
    """Make a function that returns the outputs of the teachers.

    Args:
        teachers: frozen networks.
        data: that section of the run's configuration.

    Returns:
        A function of (what `frozen_inputs` returned, images normalized as the run's, numbers of the examples).
    """

    def teach(frozen: Any, images: Array, examples: Array) -> tuple[TeacherOutputs, ...]:
        if "stored" in frozen:
            logits_BxTxK = frozen["stored"][examples]
            return tuple(TeacherOutputs(logits_BxTxK[:, t]) for t in range(logits_BxTxK.shape[1]))
        outputs = []
        for teacher, own in zip(teachers, frozen["teachers"], strict=True):
            outputs.append(teacher(own, _renormalized(images, data, teacher)))
        return lax.stop_gradient(tuple(outputs))

    return teach


def _renormalized(images: Array, data: Any, teacher: Teacher) -> Array:
    """Return images normalized as the teacher wants them, from images normalized as the run's."""
    own, its = (np.asarray((d.mean, d.std), np.float64) for d in (data, teacher.preprocessing))
    if np.array_equal(own, its):
        return images
    scale, shift = own[1] / its[1], (own[0] - its[0]) / its[1]
    return images * jnp.asarray(scale, images.dtype) + jnp.asarray(shift, images.dtype)
