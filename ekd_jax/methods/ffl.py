"""Feature fusion for online mutual knowledge distillation.

References:
    Kim, Hyun, Chung, Kwak, "Feature Fusion for Online Mutual Knowledge Distillation", ICPR 2020, arXiv
    1904.09058; official code Jangho-Kim/FFL-pytorch, train_FFL.py, our_network.py and utils.py
    (docs/reference/ffl.md).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ekd_jax.common.errors import UserError
from ekd_jax.methods.base import Batch, Terms, cross_entropy_terms, per_student
from ekd_jax.methods.distilling import WithRampUp
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import ConvNorm, Linear, Mode, global_pool

Array = jax.Array


class Fusion(nn.Module):
    """The fusion module: a classifier of the students' last feature maps, concatenated.

    Depthwise 3x3 convolution, BN, ReLU; 1x1 convolution to the channels of student 1, BN, ReLU; global
    average pooling; linear layer.
    """

    @nn.compact
    def __call__(self, outputs: Outputs, train: bool) -> Array:
        """Return the fused logits, (B, K)."""
        if len({x.shape[1:3] for x in outputs.pooled}) > 1:
            raise UserError("ffl fuses the last feature maps of the students, which must be of equal size")
        x = jnp.concatenate(outputs.pooled, -1)
        mode = Mode(train, x.dtype)
        x = ConvNorm(x.shape[-1], 3, groups=x.shape[-1], name="depthwise")(x, mode)
        x = ConvNorm(outputs.pooled[0].shape[-1], 1, name="pointwise")(x, mode)
        return Linear(outputs.logits_SxBxK.shape[-1], torch_default, name="linear")(global_pool(x))


class FFL(WithRampUp):
    """Feature fusion learning of branches and a fused classifier (Kim, Hyun, Chung, Kwak, ICPR 2020).

        L = sum_i CE(z_i) + CE(z_f) + ramp (sum_i T^2 KL(sg z_f || z_i) + T^2 KL(sg mean_i z_i || z_f))

    z_f are the logits of the fusion module, and of the ensemble. CE(z_f) and the KD loss of z_f train the
    branches, too, through their feature maps. T = 3, R = 80 epochs and the weight 1 are the official
    code's. The paper has two branches; more are treated alike.

    Two things differ from the official code. It adds 1e-7 to the targets' probabilities so that none is 0;
    here both sides are log-softmaxes, and nothing is added. And it has a weight decay of 1e-4 for the
    networks and 1e-5 for the fusion module; here `optimizer.weight_decay` holds for both.
    """

    own_stages = 1

    def setup(self) -> None:
        self.fusion = Fusion()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = cross_entropy_terms(outputs, batch)
        fused_BxK = self.fusion(outputs, train=True)
        terms["ensemble/loss_ce"] = batch.cross_entropy(fused_BxK)
        terms["ensemble/loss_kd"] = self.distillation_loss(fused_BxK, outputs.logits_SxBxK.mean(0), batch)
        kd_S = self.distillation_loss(outputs.logits_SxBxK, fused_BxK, batch)
        terms |= per_student("loss_kd", kd_S)
        kd = kd_S.sum() + terms["ensemble/loss_kd"]
        return ce + terms["ensemble/loss_ce"] + self.ramp(batch) * kd, terms

    def ensemble_logits(self, outputs: Outputs) -> Array:
        return self.fusion(outputs, train=False)
