"""Losses as pure functions, one formula each. Gradients are stopped by the caller, not here.

Shapes: logits (..., B, K), labels (B,) integers or (B, K) shares; a leading axis (students) is kept.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

Array = jax.Array


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean over the batch of -log softmax(z)[y] (METHODS.md 1.2, L_A; paper Eq. 1).

    Args:
        logits: (..., B, K) floating.
        labels: (B,) integers in [0, K), or (B, K) shares of the classes that sum to 1 (mixed images,
            smoothed labels): -sum_k y_k log softmax(z)_k then.

    Returns:
        (...): one value for each leading index.
    """
    if labels.ndim == 2:
        return optax.softmax_cross_entropy(logits, labels).mean(-1)
    labels = jnp.broadcast_to(labels, logits.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(-1)


def knowledge_distillation(
    logits: Array, teacher_logits: Array, temperature: float, scale: bool = True
) -> Array:
    """T^2 KL(softmax(z_T/T) || softmax(z/T)), summed over classes, mean over the batch (L_C, Eq. 6).

    Both sides are log-softmaxes: the official code's softmax().log() gives NaN where the teacher's
    probability underflows.

    Args:
        logits: (..., B, K), the learner's.
        teacher_logits: (..., B, K), broadcast against `logits`.
        temperature: T > 0.
        scale: multiply by T^2, which keeps the size of the gradients (paper: not written; official
            code: done).

    Returns:
        (...): one value for each leading index.
    """
    log_p = jax.nn.log_softmax(logits / temperature)
    softened = teacher_logits / temperature
    log_teacher, teacher = jax.nn.log_softmax(softened), jax.nn.softmax(softened)  # XLA: one exponential
    divergence = (teacher * (log_teacher - log_p)).sum(-1).mean(-1)
    return divergence * temperature**2 if scale else divergence


def standardized(logits: Array) -> Array:
    """(z - mean) / std over the classes of every example, std unbiased plus 1e-7: logit standardization
    (Sun et al., CVPR 2024; official code, distillers/KD.py).

    Args:
        logits: (..., B, K) with K > 1.
    """
    mean = logits.mean(-1, keepdims=True)
    # of equal logits the root has no gradient: they are 0 whatever the deviation
    variance = jnp.square(logits - mean).sum(-1, keepdims=True) / (logits.shape[-1] - 1)
    std = jnp.sqrt(jnp.where(variance > 0, variance, 1.0))
    return (logits - mean) / (1e-7 + jnp.where(variance > 0, std, 0.0))


def decoupled_distillation(
    logits: Array,
    teacher_logits: Array,
    classes: Array,
    temperature: float,
    target_weight: float,
    others_weight: float,
    scale: bool = True,
) -> Array:
    """alpha TCKD + beta NCKD: the target's probability against all others', and the others among
    themselves (DKD, Zhao et al., CVPR 2022, Eq. 7; official code, mdistiller/distillers/DKD.py).

    Args:
        logits: (..., B, K), the learner's, K > 1.
        teacher_logits: (..., B, K), broadcast against `logits`.
        classes: (B,) integers.
        temperature: T > 0.
        target_weight: alpha.
        others_weight: beta.
        scale: multiply by T^2 (official code: done).

    Returns:
        (...): one value for each leading index, means over the batch.
    """
    target = jax.nn.one_hot(classes, logits.shape[-1], dtype=bool)

    def split(z: Array) -> tuple[Array, Array]:
        """log of (target, all others) and of the others among themselves."""
        z = z / temperature
        alone = jnp.where(target, -jnp.inf, z)
        others = jax.nn.logsumexp(alone, -1)
        two = jax.nn.log_softmax(jnp.stack([jnp.where(target, z, 0).sum(-1), others], -1))
        return two, jnp.where(target, 0.0, z - others[..., None])

    two, rest = split(logits)
    teacher_two, teacher_rest = split(teacher_logits)
    of_target = (jnp.exp(teacher_two) * (teacher_two - two)).sum(-1).mean(-1)
    weights = jnp.where(target, 0.0, jnp.exp(teacher_rest))
    of_others = (weights * (teacher_rest - rest)).sum(-1).mean(-1)
    loss = target_weight * of_target + others_weight * of_others
    return loss * temperature**2 if scale else loss


def correlation_distillation(
    logits: Array, teacher_logits: Array, temperature: float, between: float, within: float
) -> Array:
    """T^2 (beta inter + gamma intra): 1 - Pearson's correlation of the probabilities over the classes of
    an example, and over the examples of a class, means (DIST, Huang et al., NeurIPS 2022, Eq. 6-10;
    constants and T^2 as in METHODS.md 13).

    Args:
        logits: (..., B, K), the learner's.
        teacher_logits: (..., B, K), broadcast against `logits`.
        temperature: T > 0, of the softmaxes.
        between: beta, weight of the inter-class relation.
        within: gamma, weight of the intra-class relation.

    Returns:
        (...): one value for each leading index.
    """
    p, teacher = jax.nn.softmax(logits / temperature), jax.nn.softmax(teacher_logits / temperature)

    def centerd(v: Array, axis: int) -> Array:
        """v less its mean, with 1 for its largest entry: neither shift nor scale changes a correlation, and
        so products do not underflow. 0 where v varies by no more than its rounding."""
        rounding = 16 * jnp.finfo(v.dtype).eps * v.max(axis, keepdims=True)
        v = v - lax.slice_in_dim(v, 0, 1, axis=axis)  # of nearly equal entries the mean is exact then
        v = v - v.mean(axis, keepdims=True)
        largest = lax.stop_gradient(jnp.abs(v).max(axis, keepdims=True))
        varies = largest > rounding
        return jnp.where(varies, v / jnp.where(varies, largest, 1.0), 0.0)

    def distance(axis: int) -> Array:
        a, b = centerd(p, axis), centerd(teacher, axis)
        product = (a * a).sum(axis) * (b * b).sum(axis)
        # where nothing varies, nothing is correlated
        cosine = (a * b).sum(axis) / jnp.sqrt(jnp.where(product > 0, product, 1.0))
        return (1 - cosine).mean(-1)

    return temperature**2 * (between * distance(-1) + within * distance(-2))


def mean_squared_error(a: Array, b: Array) -> Array:
    """Mean over all elements of (a - b)^2, computed in float32 at least (L_B; official nn.MSELoss)."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.square(a.astype(dtype) - b.astype(dtype)).mean()


@jax.custom_vjp
def adapted_error(x: Array, kernel: Array, bias: Array, target: Array) -> Array:
    """`mean_squared_error(x kernel + bias, target)`: of maps that a 1x1 convolution adapts.

    The gradient is written out: it keeps the difference, and multiplies it as it is. Autodiff's would write
    the scaled difference down once more.

    Args:
        x: (..., C).
        kernel, bias: (C, K), (K,) float32; applied in x's dtype.
        target: (..., K), a constant.
    """
    return _adapted_forward(x, kernel, bias, target)[0]


def _adapted_forward(
    x: Array, kernel: Array, bias: Array, target: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    adapted = x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype) + bias.astype(x.dtype)
    difference = adapted.astype(dtype) - target.reshape(adapted.shape).astype(dtype)
    return jnp.square(difference).mean(), (x, kernel, difference)


def _adapted_backward(kept: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, Array, None]:
    x, kernel, difference = kept
    scale, d = 2 * g / difference.size, difference.astype(x.dtype)
    dx = d @ (scale * kernel.T).astype(x.dtype)
    dkernel = scale * (x.reshape(-1, x.shape[-1]).T @ d)
    dbias = scale * difference.sum(0)
    return dx.reshape(x.shape), dkernel.astype(kernel.dtype), dbias.astype(kernel.dtype), None


adapted_error.defvjp(_adapted_forward, _adapted_backward)
