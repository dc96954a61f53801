"""TODO: training.teaching."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ekd_jax.common import parallel
from ekd_jax.config.build import make_method
from ekd_jax.data.augment import normalize
from ekd_jax.data.feed import Feed
from ekd_jax.data.opening import Data
from ekd_jax.data.resident import Resident, read_all
from ekd_jax.methods.base import TeacherOutputs
from ekd_jax.runs.teachers import Array, Teacher


def fixed_images(data: Any) -> bool:
    """Whether an image looks the same in every epoch."""
    drawn = data.crop_padding or data.flip or data.rotation or data.cutout or data.mixup
    return not drawn and data.policy == "none" and data.fit != "crop"


def frozen_inputs(teachers: Sequence[Teacher], config: Any, data: Data, feed: Feed) -> Any:
    """What `make_teach` needs on the devices, as numpy arrays.

    The teachers' variables; or, where an image looks the same in every epoch, the training set is on the
    devices and the method compares logits alone, a table of their logits `{"stored": (N, T, K) float32}`,
    computed once.
    """
    needs_maps = make_method(config).uses_teacher_maps
    if teachers and fixed_images(config.data) and isinstance(feed, Resident) and not needs_maps:
        return {"stored": _logits(teachers, config, data)}
    return {"teachers": [teacher.frozen for teacher in teachers]}


def _logits(teachers: Sequence[Teacher], config: Any, data: Data) -> np.ndarray:
    size, number = min(config.evaluate.batch_size, len(data.train)), len(data.train)

    @jax.jit
    def say(frozen: Any, images: Array) -> Array:
        given = [t(own, normalize(images, t.mean, t.std)) for t, own in zip(teachers, frozen, strict=True)]
        return jnp.stack([outputs.logits for outputs in given], 1)

    images, _ = read_all(data.train, data, range(number))
    parts = []
    with jax.transfer_guard("allow"):
        frozen = jax.device_put([teacher.frozen for teacher in teachers])
        for first in range(0, number, size):
            places = np.arange(first, first + size).clip(max=number - 1)  # one shape, compiled once
            parts.append(np.asarray(say(frozen, images[places])))
    logits: np.ndarray = parallel.from_main(np.concatenate(parts)[:number])
    return logits


def make_teach(teachers: Sequence[Teacher], data: Any) -> Any:
    """A function of (frozen, images normalized as the run's, numbers of the examples) that gives the
    outputs of the teachers; from the table `frozen["stored"]` where there is one."""

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
    """Images as the teacher wants them, from images as the run normalizes them."""
    own, its = (np.asarray((d.mean, d.std), np.float64) for d in (data, teacher))
    if np.array_equal(own, its):
        return images
    scale, shift = own[1] / its[1], (own[0] - its[0]) / its[1]
    return images * jnp.asarray(scale, images.dtype) + jnp.asarray(shift, images.dtype)
