"""Knowledge distillation from one or several frozen teachers.

Hinton, Vinyals, Dean 2015 (arXiv 1503.02531); constants as in RepDistiller's and mdistiller's protocol for
CIFAR-100 (METHODS.md 4).
"""

import jax
import jax.numpy as jnp

from ekd_jax.methods.base import Batch, Terms, check_choice, check_not_negative, label_terms, per_student
from ekd_jax.methods.distilling import Distilling, Taught, mean_of
from ekd_jax.models.ensemble import Outputs

AVERAGES = ("logits", "probabilities")


class FromTeachers(Distilling):
    """L = sum over students of ce_weight * CE + kd_weight * T^2 KL(teacher || student).

    Every student learns by itself; several teachers are one, their average.

    Attributes:
        ce_weight: of the cross entropy (Hinton: 1 - lambda; .1).
        kd_weight: of the KD loss (Hinton: lambda; .9).
        average: what of several teachers is averaged: "logits" or "probabilities".

    The KD loss has the knobs of `Distilling`; T is 4.
    """

    sharing = "none"

    ce_weight: float = 0.1
    kd_weight: float = 0.9
    average: str = "logits"

    def __post_init__(self) -> None:
        check_not_negative(self, "ce_weight", "kd_weight")
        check_choice(self, "average", AVERAGES)
        super().__post_init__()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[jax.Array, Terms]:
        ce, terms = label_terms(outputs, batch.labels)
        logits_TxBxK = jnp.stack([teacher.logits for teacher in batch.teachers])
        teacher_BxK = mean_of(logits_TxBxK, self.temperature, self.average)
        kd_S = self.distil(outputs.logits_SxBxK, teacher_BxK, batch)
        terms |= per_student("loss_kd", kd_S)
        return self.ce_weight * ce + self.kd_weight * kd_S.sum(), terms


class Kd(FromTeachers, Taught):
    """Hinton's knowledge distillation, from teachers that are there: `FromTeachers`."""
