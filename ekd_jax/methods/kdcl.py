"""Online knowledge distillation via collaborative learning.

References:
    Guo, Wang, Wu, Yu, Liang, Hu, Luo, "Online Knowledge Distillation via Collaborative Learning", CVPR
    2020. No official code was found, and the paper was not at hand: a reconstruction (docs/reference/kdcl.md).
    Not verified are the formulas of the targets "naive", "linear", "minlogit" and "general", T = 2 and the
    weight 1.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.common.knob import NOT_NEGATIVE, one_of
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, cross_entropy_terms, knob, per_student
from ekd_jax.methods.distilling import WithKDLoss
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import constant

Array = jax.Array
TARGETS = ("naive", "linear", "minlogit", "general", "mean")
STEPS, LONGEST = 50, 8.0  # of the search for convex weights: number of steps, largest step size
RIDGE = 1e-3  # added to the diagonal of the error covariance, whose trace is 1


class ErrorCovariance(nn.Module):
    """The covariance of the networks' errors e, E[sum_k e_ik e_jk], as a running mean over batches."""

    momentum: float = 0.9  # of the old value

    @nn.compact
    def __call__(self, errors_SxBxK: Array) -> Array:
        """Return the running mean with this batch, (S, S). It starts at 0, so its scale means nothing."""
        shape = (len(errors_SxBxK),) * 2
        running = self.variable("batch_stats", "covariance", constant(0.0), None, shape, jnp.float32)
        if not self.is_initializing():
            found = (errors_SxBxK[:, None] * errors_SxBxK).sum(-1).mean(-1)
            running.value = self.momentum * running.value + (1 - self.momentum) * found
        return running.value


class KDCL(WithKDLoss):
    """Collaborative learning of networks with views of their own, a reconstruction (Guo et al., CVPR 2020).

        L = sum_i ce_weight CE(z_i) + kd_weight T^2 KL(sg target || z_i)

    The networks share nothing and may be different ones, `model.students=("resnet56", "resnet20")`; each
    sees its own augmentation of the images. The target is made of the logits of all networks:

    - "naive": those of the network with the lowest cross entropy on the batch.
    - "linear": their mean with the convex weights of the lowest cross entropy on the batch, which
      `convex_weights` searches.
    - "minlogit": for each class, the minimum over networks of z - z_target.
    - "general": their mean with the weights C^-1 1 / (1^T C^-1 1), for the covariance C of the networks'
      errors (softmax minus label). The paper estimates C on a validation set once per epoch; ours is a
      running mean over training batches, and negative weights are set to 0.
    - "mean": their mean, as in the unofficial
      shaoeric/Online-Knowledge-Distillation-via-Collaborative-Learning, which has the weights .5 and .5 and
      T = 4.

    The default, "minlogit", is our choice. The ensemble is the mean of the students for all targets, as
    most targets need labels.
    """

    sharing = "none"
    separate_views = True

    temperature: float = 2.0
    target: str = knob(
        "minlogit",
        "How the target is made of all logits: naive, linear, minlogit, general or mean.",
        one_of(TARGETS),
    )
    ce_weight: float = knob(1.0, "Weight of the cross entropy.", NOT_NEGATIVE)
    kd_weight: float = knob(1.0, "Weight of the KD loss.", NOT_NEGATIVE)

    def setup(self) -> None:
        if self.target == "general":
            self.errors = ErrorCovariance()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = cross_entropy_terms(outputs, batch)
        target_BxK = self._target(lax.stop_gradient(outputs.logits_SxBxK), batch)
        kd_S = self.distillation_loss(outputs.logits_SxBxK, target_BxK, batch)
        terms |= per_student("loss_kd", kd_S)
        return self.ce_weight * ce + self.kd_weight * kd_S.sum(), terms

    def _target(self, logits_SxBxK: Array, batch: Batch) -> Array:
        match self.target:
            case "naive":
                return logits_SxBxK[losses.cross_entropy(logits_SxBxK, batch.labels).argmin()]
            case "minlogit":
                return minimum_logits(logits_SxBxK, batch.classes)
            case "linear":
                weights_S = convex_weights(logits_SxBxK, batch.labels)
            case "general":
                labels = batch.labels
                if labels.ndim == 1:
                    labels = jax.nn.one_hot(labels, logits_SxBxK.shape[-1])
                weights_S = general_weights(self.errors(jax.nn.softmax(logits_SxBxK) - labels))
            case _:
                return logits_SxBxK.mean(0)
        return (weights_S[:, None, None] * logits_SxBxK).sum(0)


def minimum_logits(logits_SxBxK: Array, classes: Array) -> Array:
    """Return the smallest logits of all networks, relative to the target class.

        min_i (z_i - z_i,target)

    Args:
        logits_SxBxK: the networks' logits.
        classes: (B,) integers, the target classes.

    Returns:
        (B, K); 0 for the target class.
    """
    target = jnp.take_along_axis(logits_SxBxK, classes[None, :, None], -1)
    return (logits_SxBxK - target).min(0)


def convex_weights(logits_SxBxK: Array, labels: Array) -> Array:
    """Return the convex weights whose weighted mean of the logits has the lowest cross entropy.

        argmin_w CE(sum_i w_i z_i),    w_i >= 0,  sum_i w_i = 1

    The search is exponentiated gradient descent: the weights' logarithms move against the gradient, scaled
    so that its largest component is the step size. A step that lowers the loss doubles the next step size;
    one that does not is undone, and halves it.

    Args:
        logits_SxBxK: the networks' logits.
        labels: (B,) integers or (B, K) shares.

    Returns:
        (S,).
    """

    def loss(weights_S: Array) -> Array:
        return losses.cross_entropy((weights_S[:, None, None] * logits_SxBxK).sum(0), labels)

    evaluate = jax.value_and_grad(loss)

    def body(_: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        log_w, size, value, gradient = carry
        slope = gradient - gradient.mean()
        slope /= jnp.maximum(jnp.abs(slope).max(), jnp.finfo(slope.dtype).tiny)
        tried = jax.nn.log_softmax(log_w - size * slope)
        found, its_gradient = evaluate(jnp.exp(tried))
        lower = found < value
        after = (tried, jnp.minimum(2 * size, LONGEST), found, its_gradient)
        return jax.tree.map(partial(jnp.where, lower), after, (log_w, size / 2, value, gradient))

    students = len(logits_SxBxK)
    log_w = jnp.full(students, -math.log(students), logits_SxBxK.dtype)
    carry = (log_w, jnp.ones((), log_w.dtype), *evaluate(jnp.exp(log_w)))
    return jnp.exp(lax.fori_loop(0, STEPS, body, carry)[0])


def general_weights(covariance_SxS: Array) -> Array:
    """Return the weights of the smallest expected squared error, without negative ones.

        C^-1 1 / (1^T C^-1 1)

    Negative weights are set to 0 and the others scaled to the sum 1. C is scaled to a trace of 1, and
    `RIDGE` added to its diagonal, so that it can be inverted if networks have equal errors.

    Args:
        covariance_SxS: C, of any scale.

    Returns:
        (S,).
    """
    trace = jnp.trace(covariance_SxS)
    scaled = covariance_SxS / jnp.maximum(trace, jnp.finfo(trace.dtype).tiny)
    ones = jnp.ones(len(scaled), scaled.dtype)
    weights = jnp.maximum(jnp.linalg.solve(scaled + RIDGE * jnp.diag(ones), ones), 0.0)
    return weights / weights.sum()
