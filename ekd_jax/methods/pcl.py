"""PCL: peer collaborative learning for online knowledge distillation.

Wu, Gong, AAAI 2021 (arXiv 2006.04147). The authors published no code: as in the unofficial
shaoeric/Peer-Collaborative-Learning-for-Online-Knowledge-Distillation, src/ (METHODS.md 12.5), but for its
ramp-up, which divides the epoch by the weight, 1, instead of 80.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ekd_jax.common.errors import UserError
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, label_terms, per_student
from ekd_jax.methods.distilling import Ramped, of_peers
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import Linear, global_pool

Array = jax.Array


class Classifier(nn.Module):
    """One linear layer on the students' pooled features side by side."""

    @nn.compact
    def __call__(self, outputs: Outputs) -> Array:
        """(B, K)"""
        features = jnp.concatenate([global_pool(x) for x in outputs.pooled], -1)
        return Linear(outputs.logits_SxBxK.shape[-1], torch_default, name="linear")(features)


class Pcl(Ramped):
    """L = CE(z_e) + sum_i CE_i + ramp * (T^2 KL(sg z_e || i) + mean_{j != i} T^2 KL(EMA_j || i)).

    Students are branches on a shared base, and each sees its own augmentation of the images. z_e are the
    logits of the ensemble teacher, a linear layer on the features of all branches; CE(z_e) trains it and
    them. EMA_j is what the moving average of student j, its mean teacher, says of the view that j sees.

    What is evaluated and taken out are the averaged networks. The ensemble's classifier is not averaged: it
    is the latest one, on the features of the averaged networks.

    Branches of the same width begin alike, as in the paper. (The unofficial code draws the convolutions of
    its copied branches once more.)

    Attributes:
        momentum: of the moving average; after t steps it is 1 - 1 / (t + 1) where that is less, so that the
            average is over all steps at first. Parameters and batch statistics are averaged.

    T is 3, R 80 epochs and the weight 1; the KD loss has the knobs of `Distilling`.
    """

    own_stages = 1
    same_beginning = True
    compares_copies = True

    momentum: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise UserError(f"method.momentum={self.momentum:g} must be at least 0 and below 1")
        super().__post_init__()

    def setup(self) -> None:
        self.classifier = Classifier()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = label_terms(outputs, batch.labels)
        teacher_BxK = self.classifier(outputs)
        terms["ensemble/loss_ce"] = losses.cross_entropy(teacher_BxK, batch.labels)
        kd_S = self.distil(outputs.logits_SxBxK, teacher_BxK, batch)
        peers_S = of_peers(
            lambda own, peers: self.distil(jnp.broadcast_to(own, peers.shape), peers, batch).mean(),
            outputs.logits_SxBxK,
            batch.copies[0].logits_SxBxK,
        )
        terms |= per_student("loss_kd", kd_S) | per_student("loss_peers", peers_S)
        return ce + terms["ensemble/loss_ce"] + self.ramp(batch) * (kd_S + peers_S).sum(), terms

    def ensemble_logits(self, outputs: Outputs) -> Array:
        return self.classifier(outputs)

    @property
    def separate_views(self) -> bool:
        return True

    @property
    def copies(self) -> int:
        return 1

    def update_copies(self, copies: Any, networks: Any, step: Array, steps: int, epochs: float) -> Any:
        """alpha * average + (1 - alpha) * network."""
        alpha = jnp.minimum(1 - 1 / (step + 1), self.momentum)
        return {"1": jax.tree.map(lambda mean, x: alpha * mean + (1 - alpha) * x, copies["1"], networks)}
