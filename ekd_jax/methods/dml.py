"""Deep mutual learning (Zhang, Xiang, Hospedales, Lu, CVPR 2018, arXiv 1706.00384; METHODS.md 3)."""

import jax
import jax.numpy as jnp

from ekd_jax.methods.base import Batch, Terms, check_choice, label_terms, per_student
from ekd_jax.methods.distilling import Distilling, mean_of, of_peers
from ekd_jax.models.ensemble import Outputs

Array = jax.Array
TARGETS = ("pairwise", "mean_probabilities", "mean_logits")
UPDATES = ("simultaneous", "alternating")


class Dml(Distilling):
    """L_k = CE_k + sum or mean over peers l != k of KL(l || k), for networks that share nothing.

    The networks may be different ones: `model.students=("resnet32", "wrn_28_10")`.

    Attributes:
        target: each peer ("pairwise", the paper), or the peers' "mean_probabilities" or "mean_logits".
        peer_reduction: of "pairwise": the "mean" over the K - 1 peers (paper) or their "sum" (the authors'
            TensorFlow code).
        update: "simultaneous", all networks from one batch; or "alternating": in every step one network
            learns, each in turn, from peers that are already updated (the authors' code). K steps then
            update each network once, and each goes through a batch of its own.

    The KD loss has the knobs of `Distilling`; T is 1 (paper).
    """

    sharing = "none"

    temperature: float = 1.0
    target: str = "pairwise"
    peer_reduction: str = "mean"
    update: str = "simultaneous"

    def __post_init__(self) -> None:
        check_choice(self, "target", TARGETS)
        check_choice(self, "peer_reduction", ("mean", "sum"))
        check_choice(self, "update", UPDATES)
        super().__post_init__()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = label_terms(outputs, batch.labels)
        logits_SxBxK = outputs.logits_SxBxK
        kd_S = of_peers(lambda own, peers: self._distil(own, peers, batch), logits_SxBxK, logits_SxBxK)
        terms |= per_student("loss_kd", kd_S)
        return ce + kd_S.sum(), terms

    def learners(self, step: Array, students: int) -> Array | None:
        if self.update == "simultaneous":
            return None
        return jnp.arange(students) == step % students

    def _distil(self, own_BxK: Array, peers_PxBxK: Array, batch: Batch) -> Array:
        if self.target == "pairwise":
            losses = self.distil(jnp.broadcast_to(own_BxK, peers_PxBxK.shape), peers_PxBxK, batch)
            return losses.mean() if self.peer_reduction == "mean" else losses.sum()
        average = self.target.removeprefix("mean_")
        return self.distil(own_BxK, mean_of(peers_PxBxK, self.temperature, average), batch)
