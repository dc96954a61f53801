"""OKDDip: online knowledge distillation with diverse peers.

Chen, Mei, Wang, Feng, Chen, AAAI 2020 (arXiv 1912.00350); as in the official code, train_GL.py,
models/model_cifar/resnet_GL.py and utils.KL_Loss (METHODS.md 12.1).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ekd_jax.common.errors import UserError
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, label_terms, per_student
from ekd_jax.methods.distilling import Ramped
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import global_pool

Array = jax.Array
FACTOR = 8  # queries and keys are so many times smaller than the features


class Attention(nn.Module):
    """softmax_b(W_q h_a . W_k h_b): how much peer a attends to peer b, an image at a time.

    All peers have W_q and W_k in common; peers of unequal width, which the paper does not have, only with
    those of their own width.
    """

    @nn.compact
    def __call__(self, features: Sequence[Array]) -> Array:
        """P features (B, C) -> (P, P, B); sums over the second axis are 1."""
        size = max(1, features[0].shape[-1] // FACTOR)

        def projected(name: str) -> Array:
            widths = dict.fromkeys(h.shape[-1] for h in features)
            kernels = {c: self.param(f"{name}_{c}", torch_default, (c, size), jnp.float32) for c in widths}
            return jnp.stack([h @ kernels[h.shape[-1]] for h in features])

        query_PxBxD, key_PxBxD = projected("query"), projected("key")
        return nn.softmax((query_PxBxD[:, None] * key_PxBxD).sum(-1), 1)


class Okddip(Ramped):
    """L = sum_i CE_i + ramp * (sum_a T^2 KL(t_a || a) + T^2 KL(mean_a z_a || leader)).

    The last student is the group leader, the one to deploy; the others are its peers, a. Each peer has a
    target of its own, t_a = sum_b A_ab z_b, over peers b and itself, with weights A from the features that
    the peers' classifiers see. The official code adds 1e-7 to the targets' probabilities; here both sides
    are log-softmaxes.

    The ensemble is the mean of all students. (The official code reports that of the peers, the re-runs of
    winycg/MCL-OKD that of all.)

    Attributes:
        detach_targets: the KD loss does not move its targets. The official code lets it: gradients flow
            into targets and attention, which learns by that alone. With True the attention stays as it was
            drawn.

    T is 3, R 80 epochs and the weight 1, as in the official code. The KD losses of `Distilling` other than
    "kl", and `standardize`, stop the target's gradient, and so need `detach_targets`.
    """

    own_stages = 1

    detach_targets: bool = False

    def __post_init__(self) -> None:
        if not self.detach_targets and (self.kd_loss != "kl" or self.standardize):
            raise UserError(
                "method.detach_targets=False goes with method.kd_loss=kl and method.standardize=False alone"
            )
        super().__post_init__()

    def setup(self) -> None:
        self.attention = Attention()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        if len(outputs.pooled) < 2:
            raise UserError("okddip takes a group leader and its peers: model.students must be 2 or more")
        ce, terms = label_terms(outputs, batch.labels)
        peers_PxBxK, leader_BxK = outputs.logits_SxBxK[:-1], outputs.logits_SxBxK[-1]
        weights_PxPxB = self.attention([global_pool(x) for x in outputs.pooled[:-1]])
        targets_PxBxK = (weights_PxPxB[..., None] * peers_PxBxK).sum(1)
        kd_P = self._agree(peers_PxBxK, targets_PxBxK, batch)
        kd_S = jnp.append(kd_P, self._agree(leader_BxK, peers_PxBxK.mean(0), batch))
        terms |= per_student("loss_kd", kd_S)
        return ce + self.ramp(batch) * kd_S.sum(), terms

    def _agree(self, logits: Array, targets: Array, batch: Batch) -> Array:
        if self.detach_targets:
            return self.distil(logits, targets, batch)
        scale = self.scale_by_temperature
        return losses.knowledge_distillation(logits, targets, self.temperature, scale)
