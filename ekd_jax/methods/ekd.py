"""Ensemble knowledge distillation (Asif, Tang, Harrer, ECAI 2020, arXiv 1909.08097; METHODS.md 5).

A compact student of parallel branches, each taught by a high-capacity teacher of its own; the mean of the
branches predicts. Of the paper only the abstract was read and there is no official code: the loss, its
weights and its temperature are a reconstruction.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.common.errors import UserError
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, check_not_negative, label_terms, per_student
from ekd_jax.methods.distilling import Distilling, Taught, mean_of
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import Linear, global_pool

Array = jax.Array


class Projection(nn.Module):
    """1x1 convolutions with bias that bring a branch's map to its teacher's channels, and how far it is
    from the teacher's then."""

    @nn.compact
    def __call__(self, maps: list[Array], teachers: list[Array]) -> Array:
        """(S,): mean squared errors of maps (B, H, W, C); of unequal H or W both are pooled first."""
        errors = []
        for i, (own, teacher) in enumerate(zip(maps, teachers, strict=True), 1):
            if own.shape[1:3] != teacher.shape[1:3]:
                own, teacher = global_pool(own), global_pool(teacher)
            linear = Linear(teacher.shape[-1], torch_default, name=f"student{i}")
            errors.append(losses.adapted_error(own, *linear.parameters(own.shape[-1]), teacher))
        return jnp.stack(errors)


class Ekd(Distilling, Taught):
    """L = CE(mean_k z_k) + sum_k [a CE_k + b T^2 KL(teacher k || k) + c MSE(h_teacher_k, A_k(h_k))].

    Branch k learns from teacher k, so there are as many branches as teachers. h_k is the map that branch k
    pools for its classifier, h_teacher_k the last map of its teacher, A_k a trained 1x1 convolution; maps
    of unequal size are compared after global pooling. The teachers' mean may pull on the branches' mean
    besides, d T^2 KL(mean of the teachers' logits || mean_k z_k). All of it is a reconstruction.

    Attributes:
        ce_weight: a, of the branches' cross entropy.
        kd_weight: b, of their KD loss (.5 to 1).
        feature_weight: c, of their maps; it must be 0 for teachers that are ensembles: they have none.
        mean_weight: d; 0: no such term.

    The KD losses have the knobs of `Distilling`; T is 4.
    """

    uses_teacher_maps = True

    ce_weight: float = 1.0
    kd_weight: float = 0.5
    feature_weight: float = 0.5
    mean_weight: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(self, "ce_weight", "kd_weight", "feature_weight", "mean_weight")
        super().__post_init__()

    def setup(self) -> None:
        self.projection = Projection()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        self._check(outputs, batch)
        logits_SxBxK, mean_BxK = outputs.logits_SxBxK, self.ensemble_logits(outputs)
        ce, terms = label_terms(outputs, batch.labels)
        terms["ensemble/loss_ce"] = losses.cross_entropy(mean_BxK, batch.labels)

        teachers_SxBxK = jnp.stack([teacher.logits for teacher in batch.teachers])
        kd_S = self.distil(logits_SxBxK, teachers_SxBxK, batch)
        terms |= per_student("loss_kd", kd_S)
        loss = terms["ensemble/loss_ce"] + self.ce_weight * ce + self.kd_weight * kd_S.sum()

        if self.feature_weight:
            last = [lax.stop_gradient(teacher.maps[-1]) for teacher in batch.teachers]
            mse_S = self.projection(list(outputs.pooled), last)
            terms |= per_student("loss_features", mse_S)
            loss += self.feature_weight * mse_S.sum()
        if self.mean_weight:
            pull = self.distil(mean_BxK, mean_of(teachers_SxBxK, self.temperature, "logits"), batch)
            terms["ensemble/loss_kd"] = pull
            loss += self.mean_weight * pull
        return loss, terms

    def _check(self, outputs: Outputs, batch: Batch) -> None:
        branches, teachers = len(outputs.pooled), len(batch.teachers)
        if branches != teachers:
            raise UserError(
                f"ekd has one teacher for each branch: method.teachers names {teachers}, model.students "
                f"asks for {branches}"
            )
        for number, teacher in enumerate(batch.teachers, 1):
            if self.feature_weight and not teacher.maps:
                raise UserError(
                    f"method.teachers: number {number} is an ensemble, which has no map to learn from: "
                    f"name one of its students (RUN:1), or set method.feature_weight=0"
                )
