"""Deep mutual learning: networks that learn from the labels and from each other.

References:
    Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", CVPR 2018, arXiv 1706.00384; the authors'
    TensorFlow code, YingZhangDUT/Deep-Mutual-Learning, train_models.py (docs/reference/dml.md).
"""

import jax
import jax.numpy as jnp

from ekd_jax.common.knob import one_of
from ekd_jax.methods.base import Batch, Terms, cross_entropy_terms, knob, per_student
from ekd_jax.methods.distilling import WithKDLoss, average_teachers, losses_from_peers
from ekd_jax.models.ensemble import Outputs

Array = jax.Array


class DML(WithKDLoss):
    """Deep mutual learning (Zhang, Xiang, Hospedales, Lu, CVPR 2018).

        L = sum_k CE(z_k) + mean_{l != k} T^2 KL(sg z_l || z_k)

    The networks share nothing and may be different ones: `model.students=("resnet32", "wrn_28_10")`. T = 1
    and the mean are the paper's. The authors' code has a sum instead (`peer_reduction=sum`) and updates the
    networks in turn (`update=alternating`): in each step one network learns, from peers that are already
    updated, so that K steps update each network once, each with a batch of its own. The code's divergence
    is sum_c p_l log(1e-8 + p_l / (p_k + 1e-8)); both constants are left out here, as log-softmaxes need
    none.
    """

    sharing = "none"

    temperature: float = 1.0
    target: str = knob(
        "pairwise",
        "What a network learns from: each peer by itself (pairwise), or the mean of the peers' "
        "probabilities or logits (mean_probabilities, mean_logits).",
        one_of(("pairwise", "mean_probabilities", "mean_logits")),
    )
    peer_reduction: str = knob(
        "mean",
        "Mean (paper) or sum (authors' code) over the K - 1 peers with target=pairwise.",
        one_of(("mean", "sum")),
    )
    update: str = knob(
        "simultaneous",
        "Update all networks in each step (simultaneous), or one per step in turn (alternating).",
        one_of(("simultaneous", "alternating")),
    )

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = cross_entropy_terms(outputs, batch)
        kd_S = losses_from_peers(
            lambda own, peers: self._loss_from(own, peers, batch), outputs.logits_SxBxK
        )
        terms |= per_student("loss_kd", kd_S)
        return ce + kd_S.sum(), terms

    def learning_students(self, step: Array, students: int) -> Array | None:
        if self.update == "simultaneous":
            return None
        return jnp.arange(students) == step % students

    def _loss_from(self, own_BxK: Array, peers_PxBxK: Array, batch: Batch) -> Array:
        """Return the KD loss of a network against its peers, a scalar."""
        if self.target == "pairwise":
            own_PxBxK = jnp.broadcast_to(own_BxK, peers_PxBxK.shape)
            kd_P = self.distillation_loss(own_PxBxK, peers_PxBxK, batch)
            return kd_P.mean() if self.peer_reduction == "mean" else kd_P.sum()
        average = self.target.removeprefix("mean_")
        peers_BxK = average_teachers(peers_PxBxK, self.temperature, average)
        return self.distillation_loss(own_BxK, peers_BxK, batch)
