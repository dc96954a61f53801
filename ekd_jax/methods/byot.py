"""Be your own teacher: distillation from a network's deepest classifier into shallow ones.

References:
    Zhang, Song, Gao, Chen, Bao, Ma, "Be Your Own Teacher: Improve the Performance of Convolutional Neural
    Networks via Self Distillation", ICCV 2019, arXiv 1905.08094. The form of the loss is the conference
    paper's; the constants, and what the hint compares, are those of the unofficial
    luanyunteng/pytorch-be-your-own-teacher, train.py and models/resnet.py (docs/reference/byot.md).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.common.knob import NOT_NEGATIVE, between
from ekd_jax.methods.base import Batch, Terms, cross_entropy_terms, knob
from ekd_jax.methods.distilling import WithKDLoss
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import ConvNorm, Linear, Mode, global_pool

Array = jax.Array
FeaturesAndLogits = tuple[Array, Array]


class ShallowClassifier(nn.Module):
    """A bottleneck and a classifier on the feature map of one stage.

    3x3 convolutions of stride 2, each with twice the channels, until the map is as small as the deepest
    one; a 1x1 convolution to the channels of the deepest one; all with BN and ReLU. Then global average
    pooling and a linear layer. The stack is ours: the paper does not give its own in detail, and the
    unofficial code has one convolution whose kernel is as large as its stride.
    """

    @nn.compact
    def __call__(self, x: Array, deepest: Array, classes: int, train: bool) -> FeaturesAndLogits:
        """Return pooled features (B, C') and logits (B, K).

        Args:
            x: feature map of the stage, (B, H, W, C).
            deepest: feature map of the last stage, (B, H', W', C').
            classes: K.
            train: whether to normalize by the batch's statistics.
        """
        mode, number = Mode(train, x.dtype), 1
        while x.shape[1] > deepest.shape[1]:
            width = min(2 * x.shape[-1], deepest.shape[-1])
            x = ConvNorm(width, 3, 2, name=f"conv{number}")(x, mode)
            number += 1
        x = ConvNorm(deepest.shape[-1], 1, name="expand")(x, mode)
        features = global_pool(x)
        return features, Linear(classes, torch_default, name="linear")(features)


class ShallowClassifiers(nn.Module):
    """A shallow classifier after each stage of each student but the last stage."""

    @nn.compact
    def __call__(self, outputs: Outputs, train: bool) -> list[list[FeaturesAndLogits]]:
        """Return `[s][j]`, the features and logits of student s after stage j."""
        classes = outputs.logits_SxBxK.shape[-1]
        return [
            [
                ShallowClassifier(name=f"student{s}_stage{j}")(row[s - 1], deepest, classes, train)
                for j, row in enumerate(outputs.features[:-1], 1)
            ]
            for s, deepest in enumerate(outputs.pooled, 1)
        ]


class BYOT(WithKDLoss):
    """Be your own teacher, self-distillation within a network (Zhang et al., ICCV 2019).

        L = CE(z) + sum_j (1 - alpha) CE(z_j) + alpha T^2 KL(sg z || z_j) + hint_weight ||F_j - sg F||^2

    z and F are the logits and pooled features of a whole network, z_j and F_j those of the classifiers
    after each of its stages but the last. The hint is summed over features and batch, as in the unofficial
    code, whose weight of 1e-6 it has; alpha = .1 and T = 3 are also from there. (That code weighs CE(z) by 1
    - alpha.) Several students, each with classifiers of its own, learn by themselves.

    Students, the classifiers "shallow_1", ... and the ensemble predict; the ensemble is the mean of all
    logits. With several students, "shallow_1_of_2" is the classifier after stage 1 of student 2.
    """

    sharing = "none"

    temperature: float = 3.0
    alpha: float = knob(
        0.1,
        "Share of the KD loss in a shallow classifier's loss; the rest is cross entropy.",
        between(0, 1),
    )
    hint_weight: float = knob(1e-6, "Weight of the squared distance to the deepest features.", NOT_NEGATIVE)

    def setup(self) -> None:
        self.shallow = ShallowClassifiers()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        loss, terms = cross_entropy_terms(outputs, batch)
        for s, found in enumerate(self.shallow(outputs, train=True)):
            deepest = lax.stop_gradient(global_pool(outputs.pooled[s]))
            for j, (features, logits) in enumerate(found, 1):
                ce = batch.cross_entropy(logits)
                kd = self.distillation_loss(logits, outputs.logits_SxBxK[s], batch)
                hint = jnp.square(features - deepest).sum()
                own = {"ce": ce, "kd": kd, "hint": hint}
                terms |= {f"student_{s + 1}/loss_{t}_shallow{j}": value for t, value in own.items()}
                loss += (1 - self.alpha) * ce + self.alpha * kd + self.hint_weight * hint
        return loss, terms

    def ensemble_logits(self, outputs: Outputs) -> Array:
        return jnp.stack([*outputs.logits_SxBxK, *self._shallow_logits(outputs)]).mean(0)

    def predictions(self, outputs: Outputs) -> list[Array]:
        logits = [*outputs.logits_SxBxK, *self._shallow_logits(outputs)]
        return [*logits, jnp.stack(logits).mean(0)]

    def prediction_names(self, outputs: Outputs) -> list[str]:
        *students, ensemble = super().prediction_names(outputs)
        ends = [f"_of_{s}" for s in range(1, len(students) + 1)] if len(students) > 1 else [""]
        stages = range(1, len(outputs.features))
        return [*students, *(f"shallow_{j}{end}" for end in ends for j in stages), ensemble]

    def _shallow_logits(self, outputs: Outputs) -> list[Array]:
        return [logits for found in self.shallow(outputs, train=False) for _, logits in found]
