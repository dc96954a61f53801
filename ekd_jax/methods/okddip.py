"""Online knowledge distillation with diverse peers.

References:
    Chen, Mei, Wang, Feng, Chen, "Online Knowledge Distillation with Diverse Peers", AAAI 2020, arXiv
    1912.00350; official code DefangChen/OKDDip-AAAI2020, train_GL.py, models/model_cifar/resnet_GL.py and
    utils.KL_Loss (docs/reference/okddip.md).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ekd_jax.common.errors import UserError
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, cross_entropy_terms, knob, per_student
from ekd_jax.methods.distilling import WithRampUp
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import global_pool

Array = jax.Array
FACTOR = 8  # features divided by the size of queries and keys


class Attention(nn.Module):
    """Attention of each peer to each other peer, per image: softmax_b((W_q h_a) . (W_k h_b)).

    All peers share W_q and W_k. Peers of unequal width, which the paper does not have, share them with
    those of their own width only.
    """

    @nn.compact
    def __call__(self, features: Sequence[Array]) -> Array:
        """Return the attention of peer a to peer b, (P, P, B); sums over b are 1.

        Args:
            features: (B, C) of each of the P peers.
        """
        size = max(1, features[0].shape[-1] // FACTOR)

        def projected(name: str) -> Array:
            widths = dict.fromkeys(h.shape[-1] for h in features)
            kernels = {c: self.param(f"{name}_{c}", torch_default, (c, size), jnp.float32) for c in widths}
            return jnp.stack([h @ kernels[h.shape[-1]] for h in features])

        query_PxBxD, key_PxBxD = projected("query"), projected("key")
        return nn.softmax((query_PxBxD[:, None] * key_PxBxD).sum(-1), 1)


class OKDDip(WithRampUp):
    """Online distillation with diverse peers and a leader (Chen, Mei, Wang, Feng, Chen, AAAI 2020).

        L = sum_i CE(z_i) + ramp (sum_a T^2 KL(t_a || z_a) + T^2 KL(mean_a z_a || z_leader)),
        t_a = sum_b A_ab z_b

    The last student is the group leader, the one to deploy; the others are its peers, a and b. Each peer
    has a target of its own, t_a, over all peers and itself, with weights A by `Attention` from the pooled
    features of the peers. T = 3, R = 80 epochs and the weight 1 are the official code's.

    The official code adds 1e-7 to the targets' probabilities; here both sides are log-softmaxes, and
    nothing is added. The ensemble is the mean of all students, as in the re-runs of winycg/MCL-OKD; the
    official code reports the mean of the peers.
    """

    own_stages = 1

    detach_targets: bool = knob(
        False,
        "Stop the gradient of the KD loss's targets. The official code does not: gradients flow into "
        "targets and attention, which learns by them alone. If they are stopped, the attention keeps its "
        "initial values.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.detach_targets and (self.kd_loss != "kl" or self.standardize):
            raise UserError(
                "method.detach_targets=False needs method.kd_loss=kl and method.standardize=False; other KD "
                "losses stop their targets' gradients: set method.detach_targets=True for them"
            )

    def setup(self) -> None:
        self.attention = Attention()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        if len(outputs.pooled) < 2:
            raise UserError("okddip needs a group leader and its peers: set model.students to 2 or more")
        ce, terms = cross_entropy_terms(outputs, batch)
        peers_PxBxK, leader_BxK = outputs.logits_SxBxK[:-1], outputs.logits_SxBxK[-1]
        weights_PxPxB = self.attention([global_pool(x) for x in outputs.pooled[:-1]])
        targets_PxBxK = (weights_PxPxB[..., None] * peers_PxBxK).sum(1)
        kd_P = self._kd(peers_PxBxK, targets_PxBxK, batch)
        kd_S = jnp.append(kd_P, self._kd(leader_BxK, peers_PxBxK.mean(0), batch))
        terms |= per_student("loss_kd", kd_S)
        return ce + self.ramp(batch) * kd_S.sum(), terms

    def _kd(self, logits: Array, targets: Array, batch: Batch) -> Array:
        if self.detach_targets:
            return self.distillation_loss(logits, targets, batch)
        scale = self.scale_by_temperature
        return losses.knowledge_distillation(logits, targets, self.temperature, scale)
