"""Peer collaborative learning for online knowledge distillation.

References:
    Wu, Gong, "Peer Collaborative Learning for Online Knowledge Distillation", AAAI 2021, arXiv 2006.04147.
    The authors published no code. Formulas are those of the unofficial
    shaoeric/Peer-Collaborative-Learning-for-Online-Knowledge-Distillation, src/ (docs/reference/pcl.md), except
    for its ramp-up, which divides the epoch by the weight, 1, instead of 80.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ekd_jax.common.knob import FRACTION
from ekd_jax.methods.base import Batch, Copies, Terms, cross_entropy_terms, knob, per_student
from ekd_jax.methods.distilling import WithRampUp, losses_from_peers
from ekd_jax.models.ensemble import Outputs, Variables
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import Linear, global_pool

Array = jax.Array


class EnsembleClassifier(nn.Module):
    """A linear layer on the students' pooled features, concatenated."""

    @nn.compact
    def __call__(self, outputs: Outputs) -> Array:
        """Return the ensemble teacher's logits, (B, K)."""
        features = jnp.concatenate([global_pool(x) for x in outputs.pooled], -1)
        return Linear(outputs.logits_SxBxK.shape[-1], torch_default, name="linear")(features)


class PCL(WithRampUp):
    """Peer collaborative learning of branches and their moving averages (Wu, Gong, AAAI 2021).

        L = CE(z_e) + sum_i CE(z_i) + ramp sum_i (T^2 KL(sg z_e || z_i) + mean_{j != i} T^2 KL(m_j || z_i))

    Students are branches on a shared base block, and each sees its own augmentation of the images. z_e are
    the logits of the ensemble teacher, a linear layer on the features of all branches; CE(z_e) trains it
    and them. m_j are the logits of the mean teacher of student j, its moving average, for the view that j
    sees. T = 3, R = 80 epochs and the weight 1 are the code's.

    After step t, counted from 1, the moving average becomes

        a average + (1 - a) network,    a = min(1 - 1 / t, momentum),

    so that it is the network itself after step 1, and the plain mean of all steps until t = 1 / (1 -
    momentum). Parameters and running batch statistics are averaged; the code averages parameters only, and
    its averaged networks update running statistics of their own.

    The averaged networks are evaluated and extracted. The ensemble's classifier is not averaged: the latest
    one is applied to the features of the averaged networks. Branches of equal width start from the same
    values, as in the paper. (The code draws the convolutions of its copied branches once more.)
    """

    own_stages = 1
    same_initial_values = True
    uses_copy_outputs = True
    separate_views = True

    momentum: float = knob(0.999, "Largest weight of the old value in the moving average.", FRACTION)

    def setup(self) -> None:
        self.classifier = EnsembleClassifier()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = cross_entropy_terms(outputs, batch)
        teacher_BxK = self.classifier(outputs)
        terms["ensemble/loss_ce"] = batch.cross_entropy(teacher_BxK)
        kd_S = self.distillation_loss(outputs.logits_SxBxK, teacher_BxK, batch)
        peers_S = losses_from_peers(
            lambda own, peers: self.distillation_loss(
                jnp.broadcast_to(own, peers.shape), peers, batch
            ).mean(),
            outputs.logits_SxBxK,
            batch.copy_outputs[0].logits_SxBxK,
        )
        terms |= per_student("loss_kd", kd_S) | per_student("loss_peers", peers_S)
        return ce + terms["ensemble/loss_ce"] + self.ramp(batch) * (kd_S + peers_S).sum(), terms

    def ensemble_logits(self, outputs: Outputs) -> Array:
        return self.classifier(outputs)

    @property
    def number_of_copies(self) -> int:
        return 1

    def update_copies(
        self, copies: Copies, networks: Variables, step: Array, steps: int, epochs: float
    ) -> Copies:
        alpha = jnp.minimum(1 - 1 / step, self.momentum)
        return {"1": jax.tree.map(lambda mean, x: alpha * mean + (1 - alpha) * x, copies["1"], networks)}
