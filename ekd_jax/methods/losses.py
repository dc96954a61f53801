"""Losses as pure functions, one per formula. Callers stop gradients; nothing is stopped here.

Logits are (..., B, K) for a batch of B examples and K classes, labels (B,) integers or (B, K) shares.
Losses are means over the batch and keep the leading axes, usually that of the students.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

Array = jax.Array


def cross_entropy(logits: Array, labels: Array, class_weights: Array | None = None) -> Array:
    """Return the cross entropy of the labels, L_A of the main method.

        -log softmax(z)_y,  or  -sum_k y_k log softmax(z)_k  for shares y

    With class weights w it is the weighted mean over the batch,

        -sum_i sum_k w_k y_ik log softmax(z_i)_k / sum_i sum_k w_k y_ik,

    which for integers is PyTorch's CrossEntropyLoss(weight=w). For shares PyTorch divides by B instead, so that
    the loss is as large as the weights happen to be.

    Args:
        logits: (..., B, K) floating.
        labels: (B,) integers in [0, K), or (B, K) shares of the classes that sum to 1 (mixed images,
            smoothed labels).
        class_weights: (K,), not negative; None: all weigh 1.

    Returns:
        (...): means over the batch; 0 if all classes of the batch weigh 0.

    References:
        Walawalkar, Shen, Savvides, ECCV 2020, Eq. 1 (docs/reference/oem.md#loss).
    """
    if class_weights is not None:
        shares = (
            labels if labels.ndim == 2 else jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        )
        weighted = shares * class_weights
        total = jnp.maximum(weighted.sum(), jnp.finfo(weighted.dtype).tiny)
        return optax.softmax_cross_entropy(logits, weighted).sum(-1) / total
    if labels.ndim == 2:
        return optax.softmax_cross_entropy(logits, labels).mean(-1)
    labels = jnp.broadcast_to(labels, logits.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(-1)


def knowledge_distillation(
    logits: Array, teacher_logits: Array, temperature: float, scale: bool = True
) -> Array:
    """Return the divergence from a teacher's softened predictions, L_C of the main method.

        T^2 KL(softmax(z_T / T) || softmax(z / T)),  summed over the classes

    Both sides are log-softmaxes. Official codes of this family take the logarithm of a softmax instead,
    which is NaN where a probability underflows; some add a small constant to prevent that, which is left
    out here (see the docstrings of ONE, OKDDip, FFL and DML).

    Args:
        logits: (..., B, K) of the student, z.
        teacher_logits: (..., B, K), z_T, broadcast against `logits`.
        temperature: T > 0.
        scale: whether to multiply by T^2, so that the gradients keep their size. The paper of the main
            method does not write the factor; its official code has it.

    Returns:
        (...): means over the batch.

    References:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
        Walawalkar, Shen, Savvides, ECCV 2020, Eq. 6.
    """
    log_p = jax.nn.log_softmax(logits / temperature)
    softened = teacher_logits / temperature
    log_teacher, teacher = jax.nn.log_softmax(softened), jax.nn.softmax(softened)  # XLA: one exponential
    divergence = (teacher * (log_teacher - log_p)).sum(-1).mean(-1)
    return divergence * temperature**2 if scale else divergence


def standardize(logits: Array) -> Array:
    """Return logits whose mean over the classes is 0 and whose deviation is 1, for each example.

        (z - mean(z)) / (1e-7 + std(z)),  std unbiased

    Args:
        logits: (..., B, K) with K > 1.

    Returns:
        (..., B, K); 0 where all logits of an example are equal.

    References:
        Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024 (LSKD);
        official code, mdistiller/distillers/KD.py, from which the 1e-7 is.
    """
    mean = logits.mean(-1, keepdims=True)
    # The square root has no gradient at 0, where all logits are equal.
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
    """Return the decoupled divergence from a teacher: of the target class, and among the other classes.

        T^2 (alpha TCKD + beta NCKD)

    TCKD is the divergence of the two probabilities (target, all others together), NCKD that of the other
    classes' probabilities, renormalized without the target.

    Args:
        logits: (..., B, K) of the student, K > 1.
        teacher_logits: (..., B, K), broadcast against `logits`.
        classes: (B,) integers, the target classes.
        temperature: T > 0.
        target_weight: alpha.
        others_weight: beta.
        scale: whether to multiply by T^2, as the official code does.

    Returns:
        (...): means over the batch.

    References:
        Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022 (DKD), Eq. 7; official
        code, mdistiller/distillers/DKD.py, which masks the target by subtracting 1000 from its logit.
    """
    target = jax.nn.one_hot(classes, logits.shape[-1], dtype=bool)

    def split(z: Array) -> tuple[Array, Array]:
        """Return log probabilities of (target, all others), and of the others without the target."""
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
    logits: Array, teacher_logits: Array, temperature: float, inter_weight: float, intra_weight: float
) -> Array:
    """Return how far predictions are from being correlated with a teacher's.

        T^2 (beta inter + gamma intra)

    With p = softmax(z / T), inter is 1 - Pearson's correlation of both p over the classes of an example,
    averaged over examples; intra is the same over the examples of a class, averaged over classes.

    The official code adds 1e-8 to the product of the two norms by which the correlation is divided. It is
    left out here: where both sides vary the correlation is exact, and where one does not vary (by no more
    than its rounding) it is taken as 0, without a gradient.

    Args:
        logits: (..., B, K) of the student.
        teacher_logits: (..., B, K), broadcast against `logits`.
        temperature: T > 0.
        inter_weight: beta.
        intra_weight: gamma.

    Returns:
        (...): one value per leading index.

    References:
        Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022 (DIST),
        Eq. 6-10; T^2 as in docs/reference/kd_losses.md#dist.
    """
    p, teacher = jax.nn.softmax(logits / temperature), jax.nn.softmax(teacher_logits / temperature)

    def centered(v: Array, axis: int) -> Array:
        """Return v less its mean, scaled so that its largest entry is 1; 0 where v does not vary.

        Neither shift nor scale changes a correlation, and so products do not underflow.
        """
        rounding = 16 * jnp.finfo(v.dtype).eps * v.max(axis, keepdims=True)
        v = v - lax.slice_in_dim(v, 0, 1, axis=axis)  # so that the mean of nearly equal entries is exact
        v = v - v.mean(axis, keepdims=True)
        largest = lax.stop_gradient(jnp.abs(v).max(axis, keepdims=True))
        varies = largest > rounding
        return jnp.where(varies, v / jnp.where(varies, largest, 1.0), 0.0)

    def distance(axis: int) -> Array:
        a, b = centered(p, axis), centered(teacher, axis)
        product = (a * a).sum(axis) * (b * b).sum(axis)
        cosine = (a * b).sum(axis) / jnp.sqrt(jnp.where(product > 0, product, 1.0))
        return (1 - cosine).mean(-1)

    return temperature**2 * (inter_weight * distance(-1) + intra_weight * distance(-2))


def mean_squared_error(a: Array, b: Array) -> Array:
    """Return the mean squared difference, L_B of the main method.

        mean((a - b)^2)

    Args:
        a: any shape.
        b: the same shape.

    Returns:
        A scalar, computed in float32 or wider.

    References:
        Walawalkar, Shen, Savvides, ECCV 2020, where differences are summed; the mean over all elements is
        the official code's (nn.MSELoss).
    """
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.square(a.astype(dtype) - b.astype(dtype)).mean()


@jax.custom_vjp
def adapted_mean_squared_error(x: Array, kernel: Array, bias: Array, target: Array) -> Array:
    """Return the mean squared error of a feature map that a 1x1 convolution adapts to a target.

        mean((x kernel + bias - target)^2)

    The gradient is written out. It keeps the difference from the forward pass and multiplies it as it is;
    automatic differentiation would write the scaled difference to memory once more.

    Args:
        x: (..., C).
        kernel: (C, K) float32, applied in x's dtype.
        bias: (K,) float32, likewise.
        target: (..., K), a constant: it gets no gradient.

    Returns:
        A scalar, computed in float32 or wider.
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


adapted_mean_squared_error.defvjp(_adapted_forward, _adapted_backward)
