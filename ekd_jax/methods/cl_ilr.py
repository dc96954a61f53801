"""Collaborative learning with intermediate-level representation sharing.

References:
    Song, Chai, "Collaborative Learning for Deep Neural Networks", NeurIPS 2018, arXiv 1805.11761; as in
    winycg/MCL-OKD, main_cifar_cl_ilr.py and models/cl_ilr_resnet.py (docs/reference/cl_ilr.md).
"""

import jax

from ekd_jax.common.knob import between
from ekd_jax.methods.base import Batch, Terms, cross_entropy_terms, knob, per_student
from ekd_jax.methods.distilling import WithKDLoss, average_teachers, losses_from_peers
from ekd_jax.models.ensemble import Outputs

Array = jax.Array


class CLILR(WithKDLoss):
    """Collaborative learning of the heads of a tree (Song, Chai, NeurIPS 2018).

        L = sum_h beta CE(z_h) + (1 - beta) T^2 KL(sg mean_{j != h} z_j || z_h)

    Students are the heads of a binary tree: all share the first part of the network, halves of them the
    next stage, quarters the one after that. Where the tree splits, the gradient that flows back is divided
    by the number of children. The paper has four heads; beta = .5 and T = 2.
    """

    sharing = "tree"

    temperature: float = 2.0
    beta: float = knob(
        0.5, "Share of the cross entropy in a head's loss; the rest is the KD loss.", between(0, 1)
    )

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = cross_entropy_terms(outputs, batch)
        kd_S = losses_from_peers(
            lambda own, others: self.distillation_loss(
                own, average_teachers(others, self.temperature, "logits"), batch
            ),
            outputs.logits_SxBxK,
        )
        terms |= per_student("loss_kd", kd_S)
        return self.beta * ce + (1 - self.beta) * kd_S.sum(), terms

    @property
    def base_gradients(self) -> str:
        return "mean"
