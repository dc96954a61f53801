"""Parts shared by several methods: a choice of KD losses, frozen teachers, a ramp-up, several teachers as one."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.common.errors import UserError
from ekd_jax.common.knob import NOT_NEGATIVE, POSITIVE, one_of
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Method, knob, ramp_up

Array = jax.Array

KD_LOSSES = ("kl", "dkd", "dist")
AVERAGES = ("logits", "probabilities")


class WithKDLoss(Method):
    """A method that distills logits, by one of three losses.

    "kl" is Hinton's divergence, "dkd" the decoupled one, "dist" compares correlations; each of them with
    standardized logits, if asked for (LSKD). Formulas and references are in `losses`.
    """

    temperature: float = knob(4.0, "Temperature T of the softmaxes in the KD loss.", POSITIVE)
    scale_by_temperature: bool = knob(
        True, "Multiply the KD loss by T^2, so that its gradients keep their size (dist always does)."
    )
    kd_loss: str = knob(
        "kl", "KD loss: Hinton's (kl), decoupled (dkd) or by correlation (dist).", one_of(KD_LOSSES)
    )
    standardize: bool = knob(False, "Standardize the logits of both sides before the KD loss (LSKD).")
    dkd_alpha: float = knob(
        1.0, "Weight of the target class against all others in kd_loss=dkd.", NOT_NEGATIVE
    )
    dkd_beta: float = knob(
        2.0, "Weight of the other classes among each other in kd_loss=dkd.", NOT_NEGATIVE
    )
    dkd_warmup_epochs: float = knob(
        20.0, "Epochs over which the weight of kd_loss=dkd rises linearly to 1; 0: none.", NOT_NEGATIVE
    )
    dist_beta: float = knob(
        2.0, "Weight of the correlation over classes in kd_loss=dist (inter-class relation).", NOT_NEGATIVE
    )
    dist_gamma: float = knob(
        2.0,
        "Weight of the correlation over examples in kd_loss=dist (intra-class relation).",
        NOT_NEGATIVE,
    )

    def distillation_loss(self, logits: Array, teacher_logits: Array, batch: Batch) -> Array:
        """Return the KD loss that the knobs describe.

        Args:
            logits: (..., B, K) of the students.
            teacher_logits: (..., B, K), broadcast against `logits`; their gradient is stopped.
            batch: the batch that they are of.

        Returns:
            (...): means over the batch.
        """
        teacher_logits = lax.stop_gradient(teacher_logits)
        if self.standardize:
            logits, teacher_logits = losses.standardize(logits), losses.standardize(teacher_logits)
        temperature, scale = self.temperature, self.scale_by_temperature
        match self.kd_loss:
            case "dkd":
                weights = self.dkd_alpha, self.dkd_beta
                loss = losses.decoupled_distillation(
                    logits, teacher_logits, batch.classes, temperature, *weights, scale
                )
                return loss * linear_warm_up(batch.epoch, self.dkd_warmup_epochs)
            case "dist":
                weights = self.dist_beta, self.dist_gamma
                return losses.correlation_distillation(logits, teacher_logits, temperature, *weights)
            case _:
                return losses.knowledge_distillation(logits, teacher_logits, temperature, scale)


class WithRampUp(WithKDLoss):
    """A method whose KD losses have a weight that ramps up: kd_weight * `ramp_up`(epoch, rampup_epochs)."""

    temperature: float = 3.0
    rampup_epochs: float = knob(
        80.0,
        "Epochs over which the weight of the KD losses ramps up; 0: full from the start.",
        NOT_NEGATIVE,
    )
    kd_weight: float = knob(1.0, "Weight of the KD losses after the ramp-up.", NOT_NEGATIVE)

    def ramp(self, batch: Batch) -> Array:
        """Return the weight of the KD losses in this step, a scalar."""
        return self.kd_weight * ramp_up(batch.epoch, self.rampup_epochs)


class WithTeachers(Method):
    """A method whose students learn from frozen teachers that exist before the run."""

    has_teachers = True

    teachers: tuple[str, ...] = knob(
        (),
        "Directories of the teachers: of students, or of finished runs (RUN is its ensemble, RUN:2 its "
        "student 2).",
    )

    @property
    def teacher_sources(self) -> tuple[str, ...]:
        """The knob `teachers`; raises UserError if it is empty."""
        if not self.teachers:
            raise UserError(
                "method.teachers is empty: name the directories of teachers, as in "
                "--config.method.teachers=\"('runs/teacher',)\""
            )
        return self.teachers


def average_teachers(logits_TxBxK: Array, temperature: float, average: str) -> Array:
    """Return the logits (B, K) that stand for several teachers.

        mean_t z_t,  or  T log(mean_t softmax(z_t / T))

    Args:
        logits_TxBxK: the teachers' logits.
        temperature: T; the softmax of the result at T is the mean of the teachers'.
        average: "logits" for the first formula, "probabilities" for the second one.
    """
    if average == "logits":
        return logits_TxBxK.mean(0)
    log_p = jax.nn.log_softmax(logits_TxBxK / temperature)
    return temperature * (jax.nn.logsumexp(log_p, 0) - math.log(len(logits_TxBxK)))


def losses_from_peers(
    loss: Callable[[Array, Array], Array], own_SxBxK: Array, peers_SxBxK: Array | None = None
) -> Array:
    """Return each student's loss against the logits of all others.

    Args:
        loss: (a student's logits (B, K), the others' (S - 1, B, K)) -> scalar.
        own_SxBxK: the students' logits.
        peers_SxBxK: their logits as peers see them, if those are others (of averaged networks).

    Returns:
        (S,); 0 for a student without peers.
    """
    students = range(len(own_SxBxK))
    if len(students) == 1:
        return jnp.zeros(1, own_SxBxK.dtype)
    peers_SxBxK = own_SxBxK if peers_SxBxK is None else peers_SxBxK
    return jnp.stack([loss(own_SxBxK[i], jnp.delete(peers_SxBxK, i, axis=0)) for i in students])


def linear_warm_up(epoch: Array, epochs: float) -> Array | float:
    """Return a weight that rises in equal steps, one per epoch.

        min((floor(epoch) + 1) / epochs, 1)

    Args:
        epoch: scalar, passes over the training set so far.
        epochs: until the weight is 1; 0: it is 1 from the start.

    References:
        mdistiller, distillers/DKD.py, which counts epochs from 1.
    """
    return jnp.minimum((jnp.floor(epoch) + 1) / epochs, 1.0) if epochs else 1.0
