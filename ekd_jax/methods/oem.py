"""Online ensemble model compression using knowledge distillation.

Walawalkar, Shen, Savvides, ECCV 2020 (arXiv 2011.07449); formulas as in the official code,
utils/Losses.py, which METHODS.md 1.2 and 1.9 hold against the paper.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, check_choice, check_not_negative, label_terms, per_student
from ekd_jax.methods.distilling import Distilling
from ekd_jax.methods.gate import Gate
from ekd_jax.models.ensemble import Features, Outputs
from ekd_jax.models.initializers import constant, torch_default
from ekd_jax.models.layers import Linear

Array = jax.Array


class Adaptation(nn.Module):
    """1x1 convolutions with bias that bring students' maps to the pseudo teacher's channels, and how far
    they are from its then."""

    @nn.compact
    def __call__(self, features: Features) -> Array:
        """(blocks, S): mean squared errors."""

        def error(b: int, i: int, x: Array, target: Array) -> Array:
            linear = Linear(target.shape[-1], torch_default, name=f"block{b}_student{i}")
            return losses.adapted_error(x, *linear.parameters(x.shape[-1]), target)

        return _errors(features, error)


class UniformWeights(nn.Module):
    """1/S for every student."""

    def __call__(self, outputs: Outputs, train: bool) -> Array:
        """(S, 1)"""
        students = len(outputs.logits_SxBxK)
        return jnp.full((students, 1), 1 / students, outputs.logits_SxBxK.dtype)


class LearnedWeights(nn.Module):
    """softmax of one trained number a student, 1/S to begin with."""

    @nn.compact
    def __call__(self, outputs: Outputs, train: bool) -> Array:
        """(S, 1)"""
        shape = (len(outputs.logits_SxBxK),)
        return nn.softmax(self.param("logits", constant(0.0), shape, jnp.float32))[:, None]


WEIGHTINGS = {"uniform": UniformWeights, "learned": LearnedWeights, "gated": Gate}
CHOICES: dict[str, tuple[str, ...]] = {
    "adaptation": ("conv", "channel_mean"),
    "ensemble_weights": tuple(WEIGHTINGS),
    "base_gradient": ("all", "pseudo_teacher"),
}


class Oem(Distilling):
    """L = alpha * sum_i CE_i + beta * sum_b sum_{i>1} MSE_bi + gamma * sum_i T^2 KL(ensemble || i).

    Attributes:
        alpha: weight of the students' cross entropy (paper: .7).
        beta: weight of the intermediate loss (paper: .15).
        gamma: weight of the KD loss (paper: .15).
        adaptation: how maps of unequal width are compared: "conv", a trained 1x1 convolution to the
            pseudo teacher's channels, or "channel_mean" of both (official Adaptation_use=False).
        adaptation_learning_rate_scale: on the adaptation layers (official code: .5; the paper does
            not say).
        ensemble_weights: of the students' logits in the ensemble teacher: "uniform" (paper and
            code: the mean), "learned" (one weight a student) or "gated" (a weight a student and
            image, from the base block's map, by ONE's gate). The last two are ours: the weights,
            and they alone, are trained by the ensemble teacher's own cross entropy.
        base_gradient: who trains the base block: "all" students or the "pseudo_teacher" alone.

    The KD loss has the knobs of `Distilling`; T is 2 (paper), the factor T^2 the official code's.
    """

    temperature: float = 2.0
    alpha: float = 0.7
    beta: float = 0.15
    gamma: float = 0.15
    adaptation: str = "conv"
    adaptation_learning_rate_scale: float = 0.5
    ensemble_weights: str = "uniform"
    base_gradient: str = "all"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            check_choice(self, name, choices)
        check_not_negative(self, "alpha", "beta", "gamma", "adaptation_learning_rate_scale")
        super().__post_init__()

    def setup(self) -> None:
        self.adaptation_layers = Adaptation()
        self.weighting = WEIGHTINGS[self.ensemble_weights]()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = label_terms(outputs, batch.labels)

        intermediate_bxS = self._intermediate(outputs)
        terms |= per_student("loss_intermediate", intermediate_bxS.sum(0))
        for b, values_S in enumerate(intermediate_bxS, 1):
            terms |= per_student(f"loss_intermediate_block{b}", values_S)

        # Students and base block enter as constants: only the ensemble weights can learn from this.
        teacher_BxK = self._combine(jax.tree.map(lax.stop_gradient, outputs), train=True)
        kd_S = self.distil(outputs.logits_SxBxK, teacher_BxK, batch)
        terms |= per_student("loss_kd", kd_S)

        loss = self.alpha * ce + self.beta * intermediate_bxS.sum() + self.gamma * kd_S.sum()
        if self.ensemble_weights != "uniform":
            terms["ensemble/loss_ce"] = losses.cross_entropy(teacher_BxK, batch.labels)
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
        """z_T = sum_i w_i z_i, (B, K); METHODS.md 1.1 and D1."""
        weights_SxB = self.weighting(outputs, train)
        return (weights_SxB[..., None] * outputs.logits_SxBxK).sum(0)

    def _intermediate(self, outputs: Outputs) -> Array:
        """(blocks, S): MSE of every map against the stopped pseudo teacher's; 0 for student 1."""
        if self.adaptation == "conv":
            errors: Array = self.adaptation_layers(outputs.features)
            return errors
        means = jax.tree.map(lambda x: x.mean(-1), outputs.features)
        return _errors(means, lambda b, i, x, target: losses.mean_squared_error(x, target))


def _errors(maps: Features, error: Callable[[int, int, Array, Array], Array]) -> Array:
    """(blocks, S): error(block, student, its map, the stopped pseudo teacher's); 0 for student 1."""
    rows = []
    for b, (first, *others) in enumerate(maps, 1):
        target = lax.stop_gradient(first)
        found = [error(b, i, x, target) for i, x in enumerate(others, 2)]
        rows.append(jnp.stack([jnp.zeros((), jnp.float32), *found]))
    return jnp.stack(rows)
