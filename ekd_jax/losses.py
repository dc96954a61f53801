"""Losses as pure functions, one formula each. Gradients are stopped by the caller, not here.

Shapes: logits (..., B, K), labels (B,) integers or (B, K) shares; a leading axis (students) is kept.
"""

import jax
import jax.numpy as jnp
import optax

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
    log_teacher = jax.nn.log_softmax(teacher_logits / temperature)
    divergence = (jnp.exp(log_teacher) * (log_teacher - log_p)).sum(-1).mean(-1)
    return divergence * temperature**2 if scale else divergence


def mean_squared_error(a: Array, b: Array) -> Array:
    """Mean over all elements of (a - b)^2, computed in float32 at least (L_B; official nn.MSELoss)."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.square(a.astype(dtype) - b.astype(dtype)).mean()
