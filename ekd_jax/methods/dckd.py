"""Deep collective knowledge distillation (Seo, Oh, Min, Yun, Cho 2023, arXiv 2304.08878; METHODS.md 6).

Students learn from a pre-trained teacher and from what they collect from each other. Abstract and
introduction of the paper were read, and there is no public code: the loss, its weights, the temperature and
the ramp-up are a reconstruction.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.methods import losses
from ekd_jax.methods.base import (
    Batch,
    Terms,
    check_choice,
    check_not_negative,
    label_terms,
    per_student,
    ramp_up,
)
from ekd_jax.methods.distilling import Distilling, Taught, mean_of, of_peers
from ekd_jax.methods.kd import AVERAGES
from ekd_jax.models.ensemble import Outputs

Array = jax.Array


class Dckd(Distilling, Taught):
    """L = sum_i [w CE_i + a T^2 KL(teacher || i) + b r(epoch) T^2 KL(q_i || i)], q_i = mean over peers
    j != i of softmax(z_j / T).

    Networks share nothing. r is ONE's ramp-up. All of it is a reconstruction.

    Attributes:
        ce_weight: w (.1 to 1; .1 is the usual schedule's for distillation on CIFAR-100).
        teacher_weight: a, of the KD loss from the teacher.
        peers_weight: b, of the KD loss from the peers.
        rampup_epochs: of r (80 is ONE's); 0: none.
        others_only: q_i and the student's probabilities without the target class, renormalized, as in the
            second term of DKD: then the peers' loss is this, whatever `kd_loss` says.
        average: what of several teachers is averaged: "logits" or "probabilities".

    The KD losses have the knobs of `Distilling`; T is 4.
    """

    sharing = "none"

    ce_weight: float = 0.1
    teacher_weight: float = 0.9
    peers_weight: float = 0.9
    rampup_epochs: float = 80.0
    others_only: bool = False
    average: str = "logits"

    def __post_init__(self) -> None:
        check_not_negative(self, "ce_weight", "teacher_weight", "peers_weight", "rampup_epochs")
        check_choice(self, "average", AVERAGES)
        super().__post_init__()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        logits_SxBxK = outputs.logits_SxBxK
        ce, terms = label_terms(outputs, batch.labels)
        teachers_TxBxK = jnp.stack([teacher.logits for teacher in batch.teachers])
        teacher_BxK = mean_of(teachers_TxBxK, self.temperature, self.average)
        kd_S = self.distil(logits_SxBxK, teacher_BxK, batch)
        peers_S = of_peers(lambda own, peers: self._collect(own, peers, batch), logits_SxBxK, logits_SxBxK)
        terms |= per_student("loss_kd", kd_S) | per_student("loss_peers", peers_S)
        ramped = self.peers_weight * ramp_up(batch.epoch, self.rampup_epochs)
        loss = self.ce_weight * ce + self.teacher_weight * kd_S.sum() + ramped * peers_S.sum()
        return loss, terms

    def _collect(self, own: Array, peers_PxBxK: Array, batch: Batch) -> Array:
        """T^2 KL(q_i || i), a scalar."""
        collected = mean_of(peers_PxBxK, self.temperature, "probabilities")
        if not self.others_only:
            return self.distil(own, collected, batch)
        collected = lax.stop_gradient(collected)
        if self.standardize:
            own, collected = losses.standardized(own), losses.standardized(collected)
        return losses.decoupled_distillation(
            own, collected, batch.classes, self.temperature, 0.0, 1.0, self.scale_by_temperature
        )
