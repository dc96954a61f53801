"""What methods with a KD loss have in common: which loss that is, and its constants."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.common.errors import UserError
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Method, check_above, check_choice, check_not_negative, ramp_up

Array = jax.Array


class Distilling(Method):
    """A method whose students are to agree with softened logits.

    Attributes:
        temperature: T of both softmaxes.
        scale_by_temperature: the factor T^2 of the KD loss.
        kd_loss: "kl", Hinton's; "dkd", decoupled; or "dist", by correlation (METHODS.md 13).
        standardize: logits of both sides are standardized before (LSKD).
        dkd_alpha, dkd_beta: weights of target and other classes in "dkd".
        dkd_warmup_epochs: over which the weight of "dkd" grows from 0 to 1.
        dist_beta, dist_gamma: weights of the relations of classes and of examples in "dist".
    """

    temperature: float = 4.0
    scale_by_temperature: bool = True
    kd_loss: str = "kl"
    standardize: bool = False
    dkd_alpha: float = 1.0
    dkd_beta: float = 2.0
    dkd_warmup_epochs: float = 20.0
    dist_beta: float = 2.0
    dist_gamma: float = 2.0

    def __post_init__(self) -> None:
        check_choice(self, "kd_loss", ("kl", "dkd", "dist"))
        check_above(self, "temperature")
        check_not_negative(self, "dkd_alpha", "dkd_beta", "dkd_warmup_epochs", "dist_beta", "dist_gamma")
        super().__post_init__()

    def distil(self, logits: Array, teacher_logits: Array, batch: Batch) -> Array:
        """The KD loss of (..., B, K) against (..., B, K), whose gradient is stopped: (...)."""
        teacher_logits = lax.stop_gradient(teacher_logits)
        if self.standardize:
            logits, teacher_logits = losses.standardized(logits), losses.standardized(teacher_logits)
        temperature, scale = self.temperature, self.scale_by_temperature
        match self.kd_loss:
            case "dkd":
                weights = self.dkd_alpha, self.dkd_beta
                loss = losses.decoupled_distillation(
                    logits, teacher_logits, batch.classes, temperature, *weights, scale
                )
                return loss * warm_up(batch.epoch, self.dkd_warmup_epochs)
            case "dist":
                weights = self.dist_beta, self.dist_gamma
                return losses.correlation_distillation(logits, teacher_logits, temperature, *weights)
            case _:
                return losses.knowledge_distillation(logits, teacher_logits, temperature, scale)


class Taught(Method):
    """A method whose students learn from frozen teachers.

    Attributes:
        teachers: folders that `ekd_jax.extract` or `ekd_jax.convert` wrote, or of finished runs: `RUN` for
            its ensemble, `RUN:2` for its student 2.
    """

    has_teachers = True

    teachers: tuple[str, ...] = ()

    @property
    def teacher_sources(self) -> tuple[str, ...]:
        if not self.teachers:
            raise UserError(
                "method.teachers is empty: name the folders of teachers, as in "
                "--config.method.teachers=\"('runs/teacher',)\""
            )
        return self.teachers


def of_peers(loss: Callable[[Array, Array], Array], own_SxBxK: Array, all_SxBxK: Array) -> Array:
    """(S,): for every student the `loss` of its own logits (B, K) and those of all others (S - 1, B, K), a
    scalar; 0 for one alone."""
    students = range(len(own_SxBxK))
    if len(students) == 1:
        return jnp.zeros(1, own_SxBxK.dtype)
    return jnp.stack([loss(own_SxBxK[i], jnp.delete(all_SxBxK, i, axis=0)) for i in students])


def mean_of(logits_TxBxK: Array, temperature: float, average: str) -> Array:
    """Logits (B, K) of several teachers as one: the mean of their "logits"; or those whose softmax at T
    is the mean of their "probabilities"."""
    if average == "logits":
        return logits_TxBxK.mean(0)
    log_p = jax.nn.log_softmax(logits_TxBxK / temperature)
    return temperature * (jax.nn.logsumexp(log_p, 0) - math.log(len(logits_TxBxK)))


def warm_up(epoch: Array, epochs: float) -> Array | float:
    """min(epoch / epochs, 1) with epochs counted from 1, as mdistiller does; 1 for 0 epochs."""
    return jnp.minimum((jnp.floor(epoch) + 1) / epochs, 1.0) if epochs else 1.0


class Ramped(Distilling):
    """A method that multiplies its KD losses by kd_weight * exp(-5 (1 - min(epoch, R) / R)^2).

    Attributes:
        rampup_epochs: R; 0: the full weight from the start.
        kd_weight: that weight.
    """

    temperature: float = 3.0
    rampup_epochs: float = 80.0
    kd_weight: float = 1.0

    def __post_init__(self) -> None:
        check_not_negative(self, "rampup_epochs", "kd_weight")
        super().__post_init__()

    def ramp(self, batch: Batch) -> jax.Array:
        """The weight of the KD losses in this step, a scalar."""
        return self.kd_weight * ramp_up(batch.epoch, self.rampup_epochs)
