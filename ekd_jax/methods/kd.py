"""Knowledge distillation from one or several frozen teachers.

References:
    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531. Constants
    are those of the usual protocol on CIFAR-100, RepDistiller and mdistiller (docs/reference/kd.md#protocol).
"""

import jax
import jax.numpy as jnp

from ekd_jax.common.knob import NOT_NEGATIVE, one_of
from ekd_jax.methods.base import Batch, Terms, cross_entropy_terms, knob, per_student
from ekd_jax.methods.distilling import AVERAGES, WithKDLoss, WithTeachers, average_teachers
from ekd_jax.models.ensemble import Outputs


class Hinton(WithKDLoss):
    """Hinton's loss, for any source of frozen teachers (Hinton, Vinyals, Dean 2015).

        L = sum_i ce_weight CE(z_i) + kd_weight T^2 KL(z_teacher || z_i)

    Each student learns by itself. Several teachers count as one, their average. T = 4, .1 and .9 are the
    protocol's; Hinton's weights are 1 - lambda and lambda.
    """

    sharing = "none"

    ce_weight: float = knob(0.1, "Weight of the cross entropy.", NOT_NEGATIVE)
    kd_weight: float = knob(0.9, "Weight of the KD loss.", NOT_NEGATIVE)
    average: str = knob(
        "logits", "How several teachers are averaged: by logits or by probabilities.", one_of(AVERAGES)
    )

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[jax.Array, Terms]:
        ce, terms = cross_entropy_terms(outputs, batch)
        logits_TxBxK = jnp.stack([teacher.logits for teacher in batch.teachers])
        teacher_BxK = average_teachers(logits_TxBxK, self.temperature, self.average)
        kd_S = self.distillation_loss(outputs.logits_SxBxK, teacher_BxK, batch)
        terms |= per_student("loss_kd", kd_S)
        return self.ce_weight * ce + self.kd_weight * kd_S.sum(), terms


class KD(Hinton, WithTeachers):
    """Knowledge distillation from frozen teachers that a configuration names (Hinton, Vinyals, Dean 2015).

    The loss is that of `Hinton`.
    """
