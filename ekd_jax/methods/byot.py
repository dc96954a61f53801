"""BYOT: be your own teacher, self-distillation from the deepest classifier to shallow ones.

Zhang, Song, Gao, Chen, Bao, Ma, ICCV 2019 (arXiv 1905.08094): the conference's form of the loss. Constants,
and what the hint compares, are those of the unofficial luanyunteng/pytorch-be-your-own-teacher, train.py
and models/resnet.py (METHODS.md 12.6).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.common.errors import UserError
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, check_not_negative, label_terms
from ekd_jax.methods.distilling import Distilling
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import ConvNorm, Linear, Mode, global_pool

Array = jax.Array
Classified = tuple[Array, Array]


class Shallow(nn.Module):
    """Bottleneck and classifier on the map of a stage.

    3x3 convolutions of stride 2, each of twice the channels, until the map is as small as the deepest, then
    a 1x1 convolution to its channels, all with BN and ReLU; mean over the map, linear. The stack is ours:
    the paper's is not known in detail, the unofficial one has a single convolution as large as its stride.
    """

    @nn.compact
    def __call__(self, x: Array, deepest: Array, classes: int, train: bool) -> Classified:
        """(B, H, W, C) -> features (B, C'), logits (B, K)."""
        mode, number = Mode(train, x.dtype), 1
        while x.shape[1] > deepest.shape[1]:
            width = min(2 * x.shape[-1], deepest.shape[-1])
            x = ConvNorm(width, 3, 2, name=f"conv{number}")(x, mode)
            number += 1
        x = ConvNorm(deepest.shape[-1], 1, name="expand")(x, mode)
        features = global_pool(x)
        return features, Linear(classes, torch_default, name="linear")(features)


class ShallowClassifiers(nn.Module):
    """One after each stage of every student but the last."""

    @nn.compact
    def __call__(self, outputs: Outputs, train: bool) -> list[list[Classified]]:
        """`[s][j]`: of student s what the classifier after stage j gives."""
        classes = outputs.logits_SxBxK.shape[-1]
        return [
            [
                Shallow(name=f"student{s}_stage{j}")(row[s - 1], deepest, classes, train)
                for j, row in enumerate(outputs.features[:-1], 1)
            ]
            for s, deepest in enumerate(outputs.pooled, 1)
        ]


class Byot(Distilling):
    """L = CE(z) + sum_j (1 - alpha) CE_j + alpha T^2 KL(sg z || j) + hint_weight ||F_j - sg F||^2.

    z and F are the logits and the pooled features of a whole network, j the classifiers after each of its
    stages but the last. The hint is summed over features and batch, as in the unofficial code whose
    weight it has. (That code has (1 - alpha) CE(z).) Several students, each with classifiers of its own,
    learn by themselves.

    What predicts are the students, the classifiers "shallow_1", ... ("shallow_1_of_2" after stage 1 of
    student 2 if there are several students) and the ensemble: the mean of all logits.

    Attributes:
        alpha: share of the KD loss in what a shallow classifier learns from.
        hint_weight: lambda.

    The KD loss has the knobs of `Distilling`; T is 3.
    """

    sharing = "none"

    temperature: float = 3.0
    alpha: float = 0.1
    hint_weight: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"method.alpha={self.alpha:g} must be from 0 to 1")
        check_not_negative(self, "hint_weight")
        super().__post_init__()

    def setup(self) -> None:
        self.shallow = ShallowClassifiers()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        loss, terms = label_terms(outputs, batch.labels)
        for s, found in enumerate(self.shallow(outputs, train=True)):
            deepest = lax.stop_gradient(global_pool(outputs.pooled[s]))
            for j, (features, logits) in enumerate(found, 1):
                ce = losses.cross_entropy(logits, batch.labels)
                kd = self.distil(logits, outputs.logits_SxBxK[s], batch)
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

    def names(self, outputs: Outputs) -> list[str]:
        *students, ensemble = super().names(outputs)
        ends = [f"_of_{s}" for s in range(1, len(students) + 1)] if len(students) > 1 else [""]
        stages = range(1, len(outputs.features))
        return [*students, *(f"shallow_{j}{end}" for end in ends for j in stages), ensemble]

    def _shallow_logits(self, outputs: Outputs) -> list[Array]:
        return [logits for found in self.shallow(outputs, train=False) for _, logits in found]
