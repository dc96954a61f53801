"""Ensemble knowledge distillation: a compact student of branches, each with a teacher of its own.

References:
    Asif, Tang, Harrer, "Ensemble Knowledge Distillation for Learning Improved and Efficient Networks", ECAI
    2020, arXiv 1909.08097 (docs/reference/ekd.md). Only the abstract was read, and there is no official code:
    the loss, its weights and its temperature are a reconstruction.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.common.errors import UserError
from ekd_jax.common.knob import NOT_NEGATIVE
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, cross_entropy_terms, knob, per_student
from ekd_jax.methods.distilling import WithKDLoss, WithTeachers, average_teachers
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import Linear, global_pool

Array = jax.Array


class Projection(nn.Module):
    """1x1 convolutions with bias, from each branch's feature map to its teacher's channels."""

    @nn.compact
    def __call__(self, maps: list[Array], teachers: list[Array]) -> Array:
        """Return the mean squared errors of the projected maps, (S,).

        Args:
            maps: (B, H, W, C) of each branch.
            teachers: (B, H', W', C') of each branch's teacher. If height or width differ, both maps are
                pooled first.
        """
        errors = []
        for i, (own, teacher) in enumerate(zip(maps, teachers, strict=True), 1):
            if own.shape[1:3] != teacher.shape[1:3]:
                own, teacher = global_pool(own), global_pool(teacher)
            linear = Linear(teacher.shape[-1], torch_default, name=f"student{i}")
            parameters = linear.parameters(own.shape[-1])
            errors.append(losses.adapted_mean_squared_error(own, *parameters, teacher))
        return jnp.stack(errors)


class EKD(WithKDLoss, WithTeachers):
    """Ensemble distillation of teachers into branches, a reconstruction (Asif, Tang, Harrer, ECAI 2020).

        L = CE(mean_k z_k) + sum_k [a CE(z_k) + b T^2 KL(t_k || z_k) + c MSE(A_k(h_k), sg g_k)]
            + d T^2 KL(mean_k t_k || mean_k z_k)

    Branch k learns from teacher k, so there are as many branches as teachers. t_k are the teacher's logits;
    h_k is the feature map that branch k pools for its classifier, g_k the last map of its teacher, and A_k a
    trained 1x1 convolution. Maps of unequal size are compared after global average pooling. The ensemble is
    the mean of the branches. All of it is a reconstruction.
    """

    uses_teacher_maps = True

    ce_weight: float = knob(1.0, "Weight a of the branches' cross entropy.", NOT_NEGATIVE)
    kd_weight: float = knob(0.5, "Weight b of the branches' KD loss.", NOT_NEGATIVE)
    feature_weight: float = knob(
        0.5,
        "Weight c of the distance between feature maps; 0 for teachers that are ensembles, which have no "
        "maps.",
        NOT_NEGATIVE,
    )
    mean_weight: float = knob(
        0.0, "Weight d of the KD loss from the teachers' mean to the branches' mean.", NOT_NEGATIVE
    )

    def setup(self) -> None:
        self.projection = Projection()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        self._check(outputs, batch)
        logits_SxBxK, mean_BxK = outputs.logits_SxBxK, self.ensemble_logits(outputs)
        ce, terms = cross_entropy_terms(outputs, batch)
        terms["ensemble/loss_ce"] = batch.cross_entropy(mean_BxK)

        teachers_SxBxK = jnp.stack([teacher.logits for teacher in batch.teachers])
        kd_S = self.distillation_loss(logits_SxBxK, teachers_SxBxK, batch)
        terms |= per_student("loss_kd", kd_S)
        loss = terms["ensemble/loss_ce"] + self.ce_weight * ce + self.kd_weight * kd_S.sum()

        if self.feature_weight:
            last = [lax.stop_gradient(teacher.maps[-1]) for teacher in batch.teachers]
            mse_S = self.projection(list(outputs.pooled), last)
            terms |= per_student("loss_features", mse_S)
            loss += self.feature_weight * mse_S.sum()
        if self.mean_weight:
            teacher_BxK = average_teachers(teachers_SxBxK, self.temperature, "logits")
            terms["ensemble/loss_kd"] = self.distillation_loss(mean_BxK, teacher_BxK, batch)
            loss += self.mean_weight * terms["ensemble/loss_kd"]
        return loss, terms

    def _check(self, outputs: Outputs, batch: Batch) -> None:
        """Raise UserError unless there is one teacher per branch, with maps if they are compared."""
        branches, teachers = len(outputs.pooled), len(batch.teachers)
        if branches != teachers:
            raise UserError(
                f"ekd has one teacher for each branch: method.teachers names {teachers}, model.students "
                f"asks for {branches}"
            )
        for number, teacher in enumerate(batch.teachers, 1):
            if self.feature_weight and not teacher.maps:
                raise UserError(
                    f"method.teachers: number {number} is an ensemble, which has no feature maps to learn "
                    f"from: name one of its students (RUN:1), or set method.feature_weight=0"
                )
