"""KDCL: online knowledge distillation via collaborative learning.

Guo, Wang, Wu, Yu, Liang, Hu, Luo, CVPR 2020. No official code was found, and the paper was not at hand: a
reconstruction (METHODS.md 12.3). Not verified are the formulas of the targets "naive", "linear", "minlogit"
and "general", T = 2 and the weight 1.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, check_choice, check_not_negative, label_terms, per_student
from ekd_jax.methods.distilling import Distilling
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import constant

Array = jax.Array
TARGETS = ("naive", "linear", "minlogit", "general", "mean")
STEPS, LONGEST = 50, 8.0  # of the search for the weights of "linear", and the longest of these steps
RIDGE = 1e-3  # added to the diagonal of the networks' error covariance of trace 1


class ErrorCovariance(nn.Module):
    """E[sum_k e_ik e_jk] of the networks' errors e, a running mean over batches."""

    momentum: float = 0.9  # of the old value

    @nn.compact
    def __call__(self, errors_SxBxK: Array) -> Array:
        """(S, S), this batch included; its scale means nothing, as it begins at 0."""
        shape = (len(errors_SxBxK),) * 2
        running = self.variable("batch_stats", "covariance", constant(0.0), None, shape, jnp.float32)
        if not self.is_initializing():
            found = (errors_SxBxK[:, None] * errors_SxBxK).sum(-1).mean(-1)
            running.value = self.momentum * running.value + (1 - self.momentum) * found
        return running.value


class Kdcl(Distilling):
    """L = sum_i ce_weight * CE_i + kd_weight * T^2 KL(sg target || i), for networks that share nothing.

    The networks may be different ones, `model.students=("resnet56", "resnet20")`, and each sees its own
    augmentation of the images. The target is made of all networks' logits:

    - "naive": those of the network with the lowest cross entropy on the batch.
    - "linear": their mean with the weights, not negative and of sum 1, that give the lowest cross entropy
      on the batch; `convex_weights` looks for them.
    - "minlogit": the minimum over networks of z - z_target, class by class.
    - "general": their mean with weights C^-1 1 / 1^T C^-1 1, from the covariance C of the networks' errors
      (softmax minus label). The paper estimates C on a validation set once an epoch; here it is a running
      mean over training batches, ours, and negative weights are set to 0.
    - "mean": the mean (shaoeric/Online-Knowledge-Distillation-via-Collaborative-Learning, with ce_weight
      and kd_weight .5 and T = 4).

    The ensemble is the mean of the students whatever the target, as most targets need labels.

    Attributes:
        target: one of these ("minlogit" for a default is our choice).
        ce_weight: of the cross entropy.
        kd_weight: of the KD loss.

    The KD loss has the knobs of `Distilling`; T is 2.
    """

    sharing = "none"

    temperature: float = 2.0
    target: str = "minlogit"
    ce_weight: float = 1.0
    kd_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice(self, "target", TARGETS)
        check_not_negative(self, "ce_weight", "kd_weight")
        super().__post_init__()

    def setup(self) -> None:
        if self.target == "general":
            self.errors = ErrorCovariance()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = label_terms(outputs, batch.labels)
        target_BxK = self._target(lax.stop_gradient(outputs.logits_SxBxK), batch)
        kd_S = self.distil(outputs.logits_SxBxK, target_BxK, batch)
        terms |= per_student("loss_kd", kd_S)
        return self.ce_weight * ce + self.kd_weight * kd_S.sum(), terms

    @property
    def separate_views(self) -> bool:
        return True

    def _target(self, logits_SxBxK: Array, batch: Batch) -> Array:
        match self.target:
            case "naive":
                return logits_SxBxK[losses.cross_entropy(logits_SxBxK, batch.labels).argmin()]
            case "minlogit":
                return smallest_logits(logits_SxBxK, batch.classes)
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


def smallest_logits(logits_SxBxK: Array, classes: Array) -> Array:
    """min over networks of z - z_target, (B, K): 0 for the target."""
    target = jnp.take_along_axis(logits_SxBxK, classes[None, :, None], -1)
    return (logits_SxBxK - target).min(0)


def convex_weights(logits_SxBxK: Array, labels: Array) -> Array:
    """(S,) weights, not negative and of sum 1, that minimize the cross entropy of the weighted mean.

    By exponentiated gradient: logarithms of the weights go down the gradient, whose largest component is
    scaled to the size of the step. A step that lowers the loss is twice as long the next time; one that
    does not is taken back, and half as long.
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
    """(S,) C^-1 1 / 1^T C^-1 1, what is negative set to 0 and the rest scaled to the sum 1.

    `RIDGE` on the diagonal, next to a trace of 1, keeps networks with equal errors apart.
    """
    trace = jnp.trace(covariance_SxS)
    scaled = covariance_SxS / jnp.maximum(trace, jnp.finfo(trace.dtype).tiny)
    ones = jnp.ones(len(scaled), scaled.dtype)
    weights = jnp.maximum(jnp.linalg.solve(scaled + RIDGE * jnp.diag(ones), ones), 0.0)
    return weights / weights.sum()
