"""Grad-CAM: where in an image a network sees its class, and how alike two networks see it.

Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra, "Grad-CAM: visual explanations from deep networks via gradient-based
localization", ICCV 2017.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ekd_jax.common.errors import UserError
from ekd_jax.data.augment import normalize
from ekd_jax.models.blocks import Head
from ekd_jax.models.ensemble import Student, Variables
from ekd_jax.students.student import LoadedStudent

BATCH = 64
TOLERANCE = 1e-3  # of the logits' deviation


def class_activation(
    student: Student, variables: Variables, images: jax.Array, classes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return Grad-CAM maps, ReLU(sum_c a_c A_c), where a_c is the mean of d logit / d A_c over the pixels.

    A is the map that the classifier pools. Its gradient is one vector-Jacobian product of what follows it.

    Args:
        student: a network.
        variables: of the network.
        images: (B, H, W, C), normalized floats.
        classes: whose logit is explained, (B,).

    Returns:
        The maps (B, h, w) float32, and by how much the logits differ that were computed from A, as a share of the
        logits' deviation; it is 0 up to rounding unless the network's head does not compute them from A alone.
    """
    outputs = student(variables, images)
    head = student.network.head(name=None)
    before: tuple[str, ...] = ()
    if isinstance(head, Head):  # what comes before pooling has run already
        head, before = head.clone(before=None), ("before",)
    own = {
        kind: {
            name: leaf
            for name, leaf in variables.get(kind, {}).get("head", {}).items()
            if name not in before
        }
        for kind in ("params", "batch_stats")
    }

    def classify(pooled: jax.Array) -> jax.Array:
        logits, _ = head.apply(own, pooled, student.mode)
        return logits

    logits, pull_back = jax.vjp(classify, outputs.pooled)
    (gradient,) = pull_back(jax.nn.one_hot(classes, logits.shape[-1], dtype=logits.dtype))
    weights = gradient.astype(jnp.float32).mean((1, 2), keepdims=True)
    maps = jax.nn.relu((weights * outputs.pooled.astype(jnp.float32)).sum(-1))
    return maps, jnp.abs(logits - outputs.logits).max() / (outputs.logits.std() + 1e-12)


def activation_maps(
    student: LoadedStudent, images: np.ndarray, labels: np.ndarray, network: Student | None = None
) -> np.ndarray:
    """Return Grad-CAM maps of a student for the classes of the images, bilinearly enlarged to their size.

    Args:
        student: as `run.student(n)` returns it.
        images: (N, H, W, C) uint8.
        labels: (N,).
        network: the same network as the student's, such as that of another seed; what was compiled for it is used.

    Returns:
        (N, H, W) float32, at least 0.

    Raises:
        UserError: the network's head does more than to classify one pooled map.
    """
    own = student.description.preprocessing
    means = tuple(own.mean), tuple(own.std)
    found = []
    for start in range(0, len(images), BATCH):
        place = np.minimum(start + np.arange(BATCH), len(images) - 1)
        maps, apart = jax.device_get(
            _of_batch(network or student.network, *means, student.variables, images[place], labels[place])
        )
        if not apart <= TOLERANCE:
            raise UserError(
                f"the head of {student.description.network.name} does not classify one pooled map"
            )
        found.append(maps[: len(images) - start])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _of_batch(
    network: Student,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    variables: Variables,
    pixels: jax.Array,
    classes: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    maps, apart = class_activation(network, variables, normalize(pixels, mean, std), classes)
    return jax.image.resize(maps, (len(maps), *pixels.shape[1:3]), "bilinear"), apart


def similarity(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of each map (N, H, W) with another one, (N,); nan where a map is constant."""
    own, other = (each.reshape(len(each), -1).astype(np.float64) for each in (maps, others))
    own, other = (each - each.mean(-1, keepdims=True) for each in (own, other))
    norms = np.linalg.norm(own, axis=-1) * np.linalg.norm(other, axis=-1)
    products = (own * other).sum(-1)
    return np.divide(products, norms, out=np.full(len(maps), np.nan), where=norms > 1e-12)
