"""Multi-model ensemble via adversarial learning: MEAL and MEAL V2.

MEAL: Shen, He, Xue, AAAI 2019 (arXiv 1812.02425), official code AaronHeee/MEAL: main.py, loss.py,
models/discriminator.py. MEAL V2: Shen, Savvides 2020 (arXiv 2009.08453), official code szq0214/MEAL-V2:
train.py, loss.py, extensions/teacher_wrapper.py. METHODS.md 9.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ekd_jax.common.errors import UserError
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, check_choice, check_not_negative, label_terms, per_student
from ekd_jax.methods.distilling import Taught
from ekd_jax.models.ensemble import Outputs, scale_gradient
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import Linear

Array = jax.Array
TAPS = ("logits", "all")
DRAW = 1 << 20  # of the key; what the networks drop has small numbers


class Discriminator(nn.Module):
    """Linear layers d -> d / shrink -> d / shrink^2 -> 2, ReLU after each, the last included."""

    shrink: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, d) -> (B, 2), scores of a student and of a teacher."""
        width = x.shape[-1]
        sizes = [max(1, width // self.shrink), max(1, width // self.shrink**2), 2]
        for number, size in enumerate(sizes, 1):
            x = nn.relu(Linear(size, torch_default, name=f"linear{number}")(x))
        return x


class Discriminators(nn.Module):
    """One for each student and tap; tells what a student gives from what the teacher does."""

    shrink: int = 2

    @nn.compact
    def __call__(self, taps: list[list[Array]], targets: list[Array]) -> Array:
        """Binary cross entropies, (S, taps), of taps[s][l] and targets[l], (B, d_l)."""
        return jnp.stack(
            [
                jnp.stack([self._loss(s, tap, *pair) for tap, pair in enumerate(pairs, 1)])
                for s, pairs in enumerate((zip(own, targets, strict=True) for own in taps), 1)
            ]
        )

    def _loss(self, s: int, tap: int, own: Array, target: Array) -> Array:
        scores = Discriminator(self.shrink, name=f"student{s}_tap{tap}")(jnp.concatenate([own, target]))
        truth = jnp.repeat(jnp.eye(2, dtype=scores.dtype), len(own), axis=0)
        return optax.sigmoid_binary_cross_entropy(scores, truth).mean()


def reversed_gradient(x: Array) -> Array:
    """x; what comes back is negated."""
    return scale_gradient(x, -1.0)


def adaptive_average_pool(x: Array, length: int) -> Array:
    """(B, L) -> (B, length): element i is the mean of x from floor(i L / length) up to
    ceil((i + 1) L / length), as PyTorch's AdaptiveAvgPool1d."""
    size, i = x.shape[-1], np.arange(length)
    first, last = i * size // length, -(-(i + 1) * size // length)
    places = first[:, None] + np.arange((last - first).max())
    weights = (places < last[:, None]) / (last - first)[:, None]
    return (x[:, places.clip(max=size - 1)] * weights.astype(x.dtype)).sum(-1)


def flattened(x: Array, length: int) -> Array:
    """A map (B, H, W, C) as (B, length): pixels row by row, pooled to that length, mean over channels."""
    means = x.mean(-1, dtype=jnp.promote_types(x.dtype, jnp.float32))  # first: both are linear
    return adaptive_average_pool(means.reshape(len(x), -1), length)


def soft_cross_entropy(logits: Array, targets: Array) -> Array:
    """-sum_k softmax(t)_k log softmax(z)_k, mean over the batch."""
    return losses.cross_entropy(logits, jax.nn.softmax(targets))


SIMILARITIES = {
    "ce": soft_cross_entropy,
    "l1": lambda own, target: jnp.abs(own - target).mean(),
    "l2": losses.mean_squared_error,
}


class Adversarial(Taught):
    """A method whose students learn from frozen teachers and against discriminators.

    Attributes:
        discriminator_learning_rate_scale: on the discriminators.
    """

    sharing = "none"

    discriminator_learning_rate_scale: float = 1.0

    def __post_init__(self) -> None:
        check_not_negative(self, "discriminator_learning_rate_scale")
        super().__post_init__()

    @property
    def learning_rate_scales(self) -> dict[str, float]:
        return {"discriminators": self.discriminator_learning_rate_scale}


class Meal(Adversarial):
    """L = sum over taps l of gamma_l H(softmax(t_l), softmax(s_l)) + eta_l BCE(D_l([s_l; t_l])).

    Every step one of the teachers, drawn uniformly, is t; T is 1 and labels are not used (their cross
    entropy is logged). A discriminator D_l tells s_l from t_l, and the student learns to mislead it. Every
    student learns by itself, against discriminators of its own.

    Teachers are in evaluation mode; the official code leaves them in training mode unless told otherwise
    (teacher_eval=0). All of them are run in every step, and what the drawn one gives is taken.

    Attributes:
        teachers: as of `Taught`.
        taps: what is compared: the "logits" (the published command for ensembles), or "all" maps of the
            stages, too, each flattened to a vector, and last the logits.
        tap_lengths: d_l of the maps, one for each or one for all; 0: as many as the teachers' maps have
            pixels (published for five of a VGG: 10000, 5000, 1000, 500).
        similarity: "ce", H; or "l1" or "l2", the mean distance of t_l and s_l themselves.
        similarity_weights: gamma, one for each tap or one for all (published for a VGG's: .001, .01, .05,
            .1, 1).
        discriminator_weights: eta, likewise.
        adversarial: the student learns to mislead the discriminators: their gradient to it is reversed (a
            reconstruction of the paper's min-max, which is not verified). False: the published code, in
            which the student minimizes their loss, too.
        discriminator_learning_rate_scale: on the discriminators (published: 1e-3 against .1).
    """

    taps: str = "logits"
    tap_lengths: tuple[int, ...] = (0,)
    similarity: str = "ce"
    similarity_weights: tuple[float, ...] = (1.0,)
    discriminator_weights: tuple[float, ...] = (1.0,)
    adversarial: bool = True
    discriminator_learning_rate_scale: float = 0.01

    def __post_init__(self) -> None:
        check_choice(self, "taps", TAPS)
        check_choice(self, "similarity", SIMILARITIES)
        for name in ("tap_lengths", "similarity_weights", "discriminator_weights"):
            if not getattr(self, name) or not all(value >= 0 for value in getattr(self, name)):
                raise UserError(f"method.{name}={getattr(self, name)} must not be empty or negative")
        super().__post_init__()

    def setup(self) -> None:
        self.discriminators = Discriminators()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        _, terms = label_terms(outputs, batch.labels)
        taps, targets = self._tapped(outputs, batch)
        similarity = SIMILARITIES[self.similarity]
        similarity_Sxl = jnp.stack(
            [jnp.stack([similarity(*pair) for pair in zip(own, targets, strict=True)]) for own in taps]
        )
        judged = jax.tree.map(reversed_gradient, taps) if self.adversarial else taps
        discriminator_Sxl = self.discriminators(judged, targets)
        terms |= per_student("loss_similarity", similarity_Sxl.sum(1))
        terms |= per_student("loss_discriminator", discriminator_Sxl.sum(1))
        gamma = self._for_each("similarity_weights", len(targets))
        eta = self._for_each("discriminator_weights", len(targets))
        loss = (similarity_Sxl * jnp.array(gamma) + discriminator_Sxl * jnp.array(eta)).sum()
        return loss, terms

    @property
    def uses_teacher_maps(self) -> bool:  # type: ignore[override]
        return self.taps == "all"

    def _tapped(self, outputs: Outputs, batch: Batch) -> tuple[list[list[Array]], list[Array]]:
        """The students' taps [s][l] and the drawn teacher's [l], (B, d_l) each."""
        given = [[logits] for logits in outputs.logits_SxBxK]
        taught = [[teacher.logits] for teacher in batch.teachers]
        if self.taps == "all":
            lengths = self._lengths(outputs, batch)
            columns = zip(*outputs.features, strict=True)
            given = [self._flat(maps, lengths) + own for maps, own in zip(columns, given, strict=True)]
            taught = [
                self._flat(t.maps, lengths) + own for t, own in zip(batch.teachers, taught, strict=True)
            ]
        chosen = drawn(batch.key, len(taught))
        stacked = [jnp.stack(row) for row in zip(*taught, strict=True)]
        return given, [lax.stop_gradient(row[chosen]) for row in stacked]

    def _flat(self, maps: Sequence[Array], lengths: Sequence[int]) -> list[Array]:
        return [flattened(x, length) for x, length in zip(maps, lengths, strict=True)]

    def _lengths(self, outputs: Outputs, batch: Batch) -> list[int]:
        number = len(outputs.features)
        for i, teacher in enumerate(batch.teachers, 1):
            if len(teacher.maps) != number:
                raise UserError(
                    f"method.taps=all: teacher {i} has {len(teacher.maps)} maps, the students {number}: "
                    f"take networks of as many stages (an ensemble has no maps), or method.taps=logits"
                )
        pixels = [x.shape[1] * x.shape[2] for x in batch.teachers[0].maps]
        return [n or p for n, p in zip(self._for_each("tap_lengths", number), pixels, strict=True)]

    def _for_each(self, name: str, number: int) -> tuple:
        """A knob with one value for each of so many, or one for all."""
        values: tuple = getattr(self, name)
        if len(values) not in (1, number):
            raise UserError(f"method.{name} has {len(values)} values: give one, or {number}")
        return values * number if len(values) == 1 else values


class MealV2(Adversarial):
    """L = H(mean over teachers of softmax(t), softmax(s)) + BCE(D([s; mean of t])), on logits alone.

    All teachers are used in every step and labels are not (their cross entropy is logged). One
    discriminator a student, d -> d/8 -> d/64 -> 2, tells its logits from the mean of the teachers'; there
    is no reversal: as published, the student minimizes this loss, too. It should be trained already: pass
    the folder of a student as `model.initial_weights`, which student 1 begins with.

    Attributes:
        teachers: as of `Taught`; in evaluation mode.
        discriminator_learning_rate_scale: on the discriminators. The official code asks for 1e-4 against
            .01, but sets every rate to the network's at each epoch: 1.
    """

    def setup(self) -> None:
        self.discriminators = Discriminators(shrink=8)

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        _, terms = label_terms(outputs, batch.labels)
        teachers_TxBxK = lax.stop_gradient(jnp.stack([teacher.logits for teacher in batch.teachers]))
        target_BxK = jax.nn.softmax(teachers_TxBxK).mean(0)
        similarity_S = losses.cross_entropy(outputs.logits_SxBxK, target_BxK)
        taps = [[logits] for logits in outputs.logits_SxBxK]
        discriminator_S = self.discriminators(taps, [teachers_TxBxK.mean(0)])[:, 0]
        terms |= per_student("loss_similarity", similarity_S)
        terms |= per_student("loss_discriminator", discriminator_S)
        return similarity_S.sum() + discriminator_S.sum(), terms


def drawn(key: Any, number: int) -> Array | int:
    """One of so many, each as likely as any other, by the key of the step."""
    return jax.random.randint(jax.random.fold_in(key, DRAW), (), 0, number) if number > 1 else 0
