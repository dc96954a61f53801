"""Online ensemble model compression using knowledge distillation, the main method.

Branches of decreasing width share a base block. They learn from the labels, from the ensemble of all of
them (the ensemble teacher) and from the feature maps of student 1 (the pseudo teacher).

References:
    Walawalkar, Shen, Savvides, "Online Ensemble Model Compression using Knowledge Distillation", ECCV 2020,
    arXiv 2011.07449. Formulas are those of the official code, utils/Losses.py; where paper and code disagree
    is in docs/reference/oem.md#where-paper-and-official-code-disagree.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.common.knob import NOT_NEGATIVE, one_of
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, cross_entropy_terms, knob, per_student
from ekd_jax.methods.distilling import WithKDLoss
from ekd_jax.methods.gate import Gate
from ekd_jax.models.ensemble import Features, Outputs
from ekd_jax.models.initializers import constant, torch_default
from ekd_jax.models.layers import Linear

Array = jax.Array


class Adaptation(nn.Module):
    """1x1 convolutions with bias, from each student's feature maps to the pseudo teacher's channels."""

    @nn.compact
    def __call__(self, features: Features) -> Array:
        """Return the mean squared errors of the adapted maps, (blocks, S)."""

        def error(b: int, i: int, x: Array, target: Array) -> Array:
            linear = Linear(target.shape[-1], torch_default, name=f"block{b}_student{i}")
            return losses.adapted_mean_squared_error(x, *linear.parameters(x.shape[-1]), target)

        return _errors(features, error)


class UniformWeights(nn.Module):
    """Equal weights, 1/S for each student."""

    def __call__(self, outputs: Outputs, train: bool) -> Array:
        """Return the weights, (S, 1)."""
        students = len(outputs.logits_SxBxK)
        return jnp.full((students, 1), 1 / students, outputs.logits_SxBxK.dtype)


class LearnedWeights(nn.Module):
    """Trained weights, the softmax of one number per student; 1/S at the start."""

    @nn.compact
    def __call__(self, outputs: Outputs, train: bool) -> Array:
        """Return the weights, (S, 1)."""
        shape = (len(outputs.logits_SxBxK),)
        return nn.softmax(self.param("logits", constant(0.0), shape, jnp.float32))[:, None]


WEIGHTINGS = {"uniform": UniformWeights, "learned": LearnedWeights, "gated": Gate}


class OEM(WithKDLoss):
    """Online ensemble model compression (Walawalkar, Shen, Savvides, ECCV 2020).

        L = alpha sum_i CE(z_i) + beta sum_b sum_{i>1} MSE(A_bi(F_bi), sg F_b1)
            + gamma sum_i T^2 KL(sg z_T || z_i),    z_T = sum_i w_i z_i

    z_i are the logits of student i and F_bi its feature map of block b, A_bi a trained 1x1 convolution, sg
    stops the gradient. alpha, beta, gamma = .7, .15, .15 and T = 2 are the paper's; T^2 is the official
    code's.

    The weights w_i are 1/S in paper and code. Learned and gated weights are ours: they, and they alone, are
    trained by the ensemble teacher's own cross entropy, CE(z_T).
    """

    temperature: float = 2.0
    alpha: float = knob(0.7, "Weight of the students' cross entropy.", NOT_NEGATIVE)
    beta: float = knob(0.15, "Weight of the intermediate loss, on feature maps.", NOT_NEGATIVE)
    gamma: float = knob(0.15, "Weight of the KD loss.", NOT_NEGATIVE)
    adaptation: str = knob(
        "conv",
        "How feature maps of unequal width are compared: after a trained 1x1 convolution to the pseudo "
        "teacher's channels (conv), or as means over the channels (channel_mean, the official code's "
        "Adaptation_use=False).",
        one_of(("conv", "channel_mean")),
    )
    adaptation_learning_rate_scale: float = knob(
        0.5,
        "Factor on the learning rate of the adaptation layers, .5 in the official code.",
        NOT_NEGATIVE,
    )
    ensemble_weights: str = knob(
        "uniform",
        "Weights of the students in the ensemble teacher: equal (uniform), one trained weight per student "
        "(learned), or per student and image by ONE's gate (gated).",
        one_of(WEIGHTINGS),
    )
    base_gradient: str = knob(
        "all",
        "Who trains the base block: all students, or the pseudo_teacher alone.",
        one_of(("all", "pseudo_teacher")),
    )

    def setup(self) -> None:
        self.adaptation_layers = Adaptation()
        self.weighting = WEIGHTINGS[self.ensemble_weights]()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = cross_entropy_terms(outputs, batch)

        intermediate_bxS = self._intermediate(outputs)
        terms |= per_student("loss_intermediate", intermediate_bxS.sum(0))
        for b, values_S in enumerate(intermediate_bxS, 1):
            terms |= per_student(f"loss_intermediate_block{b}", values_S)

        # Students and base block enter as constants: only the ensemble weights can learn from this.
        teacher_BxK = self._combine(jax.tree.map(lax.stop_gradient, outputs), train=True)
        kd_S = self.distillation_loss(outputs.logits_SxBxK, teacher_BxK, batch)
        terms |= per_student("loss_kd", kd_S)

        loss = self.alpha * ce + self.beta * intermediate_bxS.sum() + self.gamma * kd_S.sum()
        if self.ensemble_weights != "uniform":
            terms["ensemble/loss_ce"] = batch.cross_entropy(teacher_BxK)
            loss += terms["ensemble/loss_ce"]
        return loss, terms

    def ensemble_logits(self, outputs: Outputs) -> Array:
        return self._combine(outputs, train=False)

    @property
    def base_gradients(self) -> str:
        return self.base_gradient

    @property
    def learning_rate_scales(self) -> dict[str, float]:
        return {"adaptation_layers": self.adaptation_learning_rate_scale}

    def _combine(self, outputs: Outputs, train: bool) -> Array:
        """Return the ensemble teacher's logits z_T, (B, K) (docs/reference/oem.md#ensemble-teacher)."""
        weights_SxB = self.weighting(outputs, train)
        return (weights_SxB[..., None] * outputs.logits_SxBxK).sum(0)

    def _intermediate(self, outputs: Outputs) -> Array:
        """Return the errors of all feature maps, (blocks, S); 0 for student 1."""
        if self.adaptation == "conv":
            errors: Array = self.adaptation_layers(outputs.features)
            return errors
        means = jax.tree.map(lambda x: x.mean(-1), outputs.features)
        return _errors(means, lambda b, i, x, target: losses.mean_squared_error(x, target))


def _errors(maps: Features, error: Callable[[int, int, Array, Array], Array]) -> Array:
    """Return `error` of every feature map, (blocks, S); 0 for student 1, the target.

    Args:
        maps: `maps[b][s]` of block b and student s.
        error: (block, student, its map, the pseudo teacher's map as a constant) -> scalar.
    """
    rows = []
    for b, (first, *others) in enumerate(maps, 1):
        target = lax.stop_gradient(first)
        found = [error(b, i, x, target) for i, x in enumerate(others, 2)]
        rows.append(jnp.stack([jnp.zeros((), jnp.float32), *found]))
    return jnp.stack(rows)
