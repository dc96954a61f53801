"""Deep collective knowledge distillation: students with a teacher that also learn from each other.

References:
    Seo, Oh, Min, Yun, Cho, "Deep Collective Knowledge Distillation", 2023, arXiv 2304.08878
    (docs/reference/dckd.md). Abstract and introduction were read, and there is no public code: the loss, its
    weights, the temperature and the ramp-up are a reconstruction.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.common.knob import NOT_NEGATIVE, one_of
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, cross_entropy_terms, knob, per_student, ramp_up
from ekd_jax.methods.distilling import (
    AVERAGES,
    WithKDLoss,
    WithTeachers,
    average_teachers,
    losses_from_peers,
)
from ekd_jax.models.ensemble import Outputs

Array = jax.Array


class DCKD(WithKDLoss, WithTeachers):
    """Deep collective knowledge distillation, a reconstruction (Seo, Oh, Min, Yun, Cho 2023).

        L = sum_i w CE(z_i) + a T^2 KL(z_teacher || z_i) + b r(epoch) T^2 KL(sg q_i || softmax(z_i / T)),
        q_i = mean_{j != i} softmax(z_j / T)

    The networks share nothing; r is ONE's ramp-up. w = .1, a = b = .9 and T = 4 are ours, after the usual
    protocol of distillation on CIFAR-100.
    """

    sharing = "none"

    ce_weight: float = knob(0.1, "Weight w of the cross entropy.", NOT_NEGATIVE)
    teacher_weight: float = knob(0.9, "Weight a of the KD loss from the teacher.", NOT_NEGATIVE)
    peers_weight: float = knob(0.9, "Weight b of the KD loss from the peers.", NOT_NEGATIVE)
    rampup_epochs: float = knob(
        80.0, "Epochs over which b ramps up, 80 as in ONE; 0: full from the start.", NOT_NEGATIVE
    )
    others_only: bool = knob(
        False,
        "Compare peers by the probabilities of the classes other than the target, renormalized, as in "
        "DKD's second term; kd_loss is then not used for them.",
    )
    average: str = knob(
        "logits", "How several teachers are averaged: by logits or by probabilities.", one_of(AVERAGES)
    )

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        logits_SxBxK = outputs.logits_SxBxK
        ce, terms = cross_entropy_terms(outputs, batch)
        teachers_TxBxK = jnp.stack([teacher.logits for teacher in batch.teachers])
        teacher_BxK = average_teachers(teachers_TxBxK, self.temperature, self.average)
        kd_S = self.distillation_loss(logits_SxBxK, teacher_BxK, batch)
        peers_S = losses_from_peers(lambda own, peers: self._loss_from(own, peers, batch), logits_SxBxK)
        terms |= per_student("loss_kd", kd_S) | per_student("loss_peers", peers_S)
        ramped = self.peers_weight * ramp_up(batch.epoch, self.rampup_epochs)
        loss = self.ce_weight * ce + self.teacher_weight * kd_S.sum() + ramped * peers_S.sum()
        return loss, terms

    def _loss_from(self, own: Array, peers_PxBxK: Array, batch: Batch) -> Array:
        """Return the loss of a student against its peers, a scalar."""
        collected = average_teachers(peers_PxBxK, self.temperature, "probabilities")
        if not self.others_only:
            return self.distillation_loss(own, collected, batch)
        collected = lax.stop_gradient(collected)
        if self.standardize:
            own, collected = losses.standardize(own), losses.standardize(collected)
        return losses.decoupled_distillation(
            own, collected, batch.classes, self.temperature, 0.0, 1.0, self.scale_by_temperature
        )
