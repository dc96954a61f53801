"""FFL: feature fusion for online mutual knowledge distillation.

Kim, Hyun, Chung, Kwak, ICPR 2020 (arXiv 1904.09058); as in the official code, train_FFL.py and
our_network.py (METHODS.md 12.4).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ekd_jax.common.errors import UserError
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, label_terms, per_student
from ekd_jax.methods.distilling import Ramped
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import ConvNorm, Linear, Mode, global_pool

Array = jax.Array


class Fusion(nn.Module):
    """The students' last maps side by side -> depthwise 3x3, BN, ReLU -> 1x1 to the channels of student 1,
    BN, ReLU -> mean over the map -> linear."""

    @nn.compact
    def __call__(self, outputs: Outputs, train: bool) -> Array:
        """(B, K)"""
        if len({x.shape[1:3] for x in outputs.pooled}) > 1:
            raise UserError("ffl fuses the last maps of the students, which must be of equal size")
        x = jnp.concatenate(outputs.pooled, -1)
        mode = Mode(train, x.dtype)
        x = ConvNorm(x.shape[-1], 3, groups=x.shape[-1], name="depthwise")(x, mode)
        x = ConvNorm(outputs.pooled[0].shape[-1], 1, name="pointwise")(x, mode)
        return Linear(outputs.logits_SxBxK.shape[-1], torch_default, name="linear")(global_pool(x))


class Ffl(Ramped):
    """L = sum_i CE_i + CE(z_f) + ramp * (sum_i T^2 KL(sg z_f || i) + T^2 KL(sg mean_i z_i || z_f)).

    z_f are the logits of the fusion module, and the ensemble's. CE(z_f), and the KD loss of z_f, train the
    branches, too, through their maps. The paper has two branches; more are treated alike.

    The official code has a weight decay of 1e-4 for the networks and of 1e-5 for the fusion module. That
    cannot be had here: `optimizer.weight_decay` is everyone's.

    T is 3, R 80 epochs and the weight 1, as in the official code; the KD loss has the knobs of
    `Distilling`.
    """

    own_stages = 1

    def setup(self) -> None:
        self.fusion = Fusion()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = label_terms(outputs, batch.labels)
        fused_BxK = self.fusion(outputs, train=True)
        terms["ensemble/loss_ce"] = losses.cross_entropy(fused_BxK, batch.labels)
        terms["ensemble/loss_kd"] = self.distil(fused_BxK, outputs.logits_SxBxK.mean(0), batch)
        kd_S = self.distil(outputs.logits_SxBxK, fused_BxK, batch)
        terms |= per_student("loss_kd", kd_S)
        kd = kd_S.sum() + terms["ensemble/loss_kd"]
        return ce + terms["ensemble/loss_ce"] + self.ramp(batch) * kd, terms

    def ensemble_logits(self, outputs: Outputs) -> Array:
        return self.fusion(outputs, train=False)
