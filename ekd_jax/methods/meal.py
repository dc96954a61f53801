"""Multi-model ensemble via adversarial learning: MEAL and MEAL V2.

References:
    Shen, He, Xue, "MEAL: Multi-Model Ensemble via Adversarial Learning", AAAI 2019, arXiv 1812.02425;
    official code AaronHeee/MEAL, main.py, loss.py, models/discriminator.py.
    Shen, Savvides, "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks",
    2020, arXiv 2009.08453; official code szq0214/MEAL-V2, train.py, loss.py, extensions/teacher_wrapper.py
    (docs/reference/meal.md).
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
from ekd_jax.common.knob import NOT_NEGATIVE, Rule, one_of
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, cross_entropy_terms, knob, per_student
from ekd_jax.methods.distilling import WithTeachers
from ekd_jax.models.ensemble import Outputs, scale_gradient
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import Linear

Array = jax.Array
DRAW = 1 << 20  # folded into the random key; networks fold in small numbers
PER_TAP = Rule(lambda values: values and all(v >= 0 for v in values), "not be empty or negative")


class Discriminator(nn.Module):
    """Linear layers d -> d / shrink -> d / shrink^2 -> 2, with a ReLU after each, the last one included."""

    shrink: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return scores of being a student's and a teacher's, (B, 2), for x (B, d)."""
        width = x.shape[-1]
        sizes = [max(1, width // self.shrink), max(1, width // self.shrink**2), 2]
        for number, size in enumerate(sizes, 1):
            x = nn.relu(Linear(size, torch_default, name=f"linear{number}")(x))
        return x


class Discriminators(nn.Module):
    """A discriminator per student and tap, which tells the student's vectors from the teacher's."""

    shrink: int = 2

    @nn.compact
    def __call__(self, taps: list[list[Array]], targets: list[Array]) -> Array:
        """Return the binary cross entropies, (S, taps).

        Args:
            taps: `taps[s][l]`, (B, d_l), vector of student s at tap l.
            targets: `targets[l]`, (B, d_l), vector of the teacher at tap l.
        """
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


def reverse_gradient(x: Array) -> Array:
    """Return x; its gradient is negated on the way back."""
    return scale_gradient(x, -1.0)


def adaptive_average_pool(x: Array, length: int) -> Array:
    """Return x averaged over windows that divide it evenly, as PyTorch's AdaptiveAvgPool1d does.

    Element i is the mean of x from floor(i L / length) up to ceil((i + 1) L / length), exclusive.

    Args:
        x: (B, L).
        length: number of windows.

    Returns:
        (B, length).
    """
    size, i = x.shape[-1], np.arange(length)
    first, last = i * size // length, -(-(i + 1) * size // length)
    places = first[:, None] + np.arange((last - first).max())
    weights = (places < last[:, None]) / (last - first)[:, None]
    return (x[:, places.clip(max=size - 1)] * weights.astype(x.dtype)).sum(-1)


def flatten_map(x: Array, length: int) -> Array:
    """Return a feature map (B, H, W, C) as vectors (B, length).

    Pixels are taken row by row, pooled to the length, and averaged over the channels.
    """
    means = x.mean(-1, dtype=jnp.promote_types(x.dtype, jnp.float32))  # first: both steps are linear
    return adaptive_average_pool(means.reshape(len(x), -1), length)


def soft_cross_entropy(logits: Array, target_logits: Array) -> Array:
    """Return the cross entropy with the softmax of other logits.

        -sum_k softmax(t)_k log softmax(z)_k

    Args:
        logits: (B, K), z.
        target_logits: (B, K), t.

    Returns:
        A scalar, the mean over the batch.
    """
    return losses.cross_entropy(logits, jax.nn.softmax(target_logits))


SIMILARITIES = {
    "ce": soft_cross_entropy,
    "l1": lambda own, target: jnp.abs(own - target).mean(),
    "l2": losses.mean_squared_error,
}


class WithDiscriminators(WithTeachers):
    """A method whose students learn from frozen teachers and against discriminators."""

    sharing = "none"

    discriminator_learning_rate_scale: float = knob(
        1.0, "Factor on the learning rate of the discriminators.", NOT_NEGATIVE
    )

    @property
    def learning_rate_scales(self) -> dict[str, float]:
        return {"discriminators": self.discriminator_learning_rate_scale}


class MEAL(WithDiscriminators):
    """Multi-model ensemble via adversarial learning (Shen, He, Xue, AAAI 2019).

        L = sum over taps l of gamma_l H(softmax(t_l), softmax(s_l)) + eta_l BCE(D_l([s_l; t_l]))

    In each step one of the teachers, drawn uniformly, is t. There is no temperature, and labels are not
    used (their cross entropy is logged). A discriminator D_l tells s_l from t_l, and the student learns to
    mislead it. Each student learns by itself, against discriminators of its own.

    The published settings: logits alone for ensembles; for five taps of a VGG vectors of 10000, 5000, 1000
    and 500 elements besides the logits, with gamma = .001, .01, .05, .1 and 1; a learning rate of 1e-3 for
    the discriminators and .1 for the network.

    Teachers are in evaluation mode; the official code leaves them in training mode by default
    (teacher_eval=0). All teachers are computed in each step, and the outputs of the drawn one are used.
    """

    taps: str = knob(
        "logits",
        "What is compared: logits alone, or the feature maps of all stages as well (all).",
        one_of(("logits", "all")),
    )
    tap_lengths: tuple[int, ...] = knob(
        (0,),
        "Lengths d_l to which feature maps are flattened, one per map or one for all; 0: the number of "
        "pixels of the teacher's map.",
        PER_TAP,
    )
    similarity: str = knob(
        "ce",
        "How vectors are compared: cross entropy of softmaxes (ce), or mean absolute (l1) or squared (l2) "
        "difference.",
        one_of(SIMILARITIES),
    )
    similarity_weights: tuple[float, ...] = knob(
        (1.0,), "Weights gamma of the similarity, one per tap or one for all.", PER_TAP
    )
    discriminator_weights: tuple[float, ...] = knob(
        (1.0,), "Weights eta of the discriminators' losses, one per tap or one for all.", PER_TAP
    )
    adversarial: bool = knob(
        True,
        "Reverse the gradient from the discriminators to the student, a reconstruction of the paper's "
        "min-max that is not verified. False: the student minimizes their loss, too, as in the published "
        "code.",
    )
    discriminator_learning_rate_scale: float = 0.01

    def setup(self) -> None:
        self.discriminators = Discriminators()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        _, terms = cross_entropy_terms(outputs, batch)
        taps, targets = self._tapped(outputs, batch)
        similarity = SIMILARITIES[self.similarity]
        similarity_Sxl = jnp.stack(
            [jnp.stack([similarity(*pair) for pair in zip(own, targets, strict=True)]) for own in taps]
        )
        judged = jax.tree.map(reverse_gradient, taps) if self.adversarial else taps
        discriminator_Sxl = self.discriminators(judged, targets)
        terms |= per_student("loss_similarity", similarity_Sxl.sum(1))
        terms |= per_student("loss_discriminator", discriminator_Sxl.sum(1))
        gamma = self._for_each("similarity_weights", len(targets))
        eta = self._for_each("discriminator_weights", len(targets))
        loss = (similarity_Sxl * jnp.array(gamma) + discriminator_Sxl * jnp.array(eta)).sum()
        return loss, terms

    @property
    def uses_teacher_maps(self) -> bool:
        return self.taps == "all"

    def _tapped(self, outputs: Outputs, batch: Batch) -> tuple[list[list[Array]], list[Array]]:
        """Return the students' vectors [s][l] and the drawn teacher's [l], (B, d_l) each."""
        given = [[logits] for logits in outputs.logits_SxBxK]
        taught = [[teacher.logits] for teacher in batch.teachers]
        if self.taps == "all":
            lengths = self._lengths(outputs, batch)
            columns = zip(*outputs.features, strict=True)
            given = [self._flat(maps, lengths) + own for maps, own in zip(columns, given, strict=True)]
            taught = [
                self._flat(t.maps, lengths) + own for t, own in zip(batch.teachers, taught, strict=True)
            ]
        chosen = draw_index(batch.key, len(taught))
        stacked = [jnp.stack(row) for row in zip(*taught, strict=True)]
        return given, [lax.stop_gradient(row[chosen]) for row in stacked]

    def _flat(self, maps: Sequence[Array], lengths: Sequence[int]) -> list[Array]:
        return [flatten_map(x, length) for x, length in zip(maps, lengths, strict=True)]

    def _lengths(self, outputs: Outputs, batch: Batch) -> list[int]:
        """Return the length of each flattened map; raise UserError if teachers have another number of maps."""
        number = len(outputs.features)
        for i, teacher in enumerate(batch.teachers, 1):
            if len(teacher.maps) != number:
                raise UserError(
                    f"method.taps=all: teacher {i} has {len(teacher.maps)} maps, the students {number}: "
                    f"choose networks with as many stages (an ensemble has no maps), or method.taps=logits"
                )
        pixels = [x.shape[1] * x.shape[2] for x in batch.teachers[0].maps]
        return [n or p for n, p in zip(self._for_each("tap_lengths", number), pixels, strict=True)]

    def _for_each(self, name: str, number: int) -> tuple[Any, ...]:
        """Return the values of a knob that has one value per tap, or one for all taps."""
        values: tuple[Any, ...] = getattr(self, name)
        if len(values) not in (1, number):
            raise UserError(f"method.{name} has {len(values)} values: give one, or {number}")
        return values * number if len(values) == 1 else values


class MEALV2(WithDiscriminators):
    """MEAL of all teachers at once, on logits alone (Shen, Savvides 2020).

        L = H(mean over teachers of softmax(t), softmax(s)) + BCE(D([s; mean over teachers of t]))

    Labels are not used (their cross entropy is logged). One discriminator per student, d -> d/8 -> d/64 ->
    2, tells its logits from the mean of the teachers'; no gradient is reversed: as published, the student
    minimizes this loss, too. The student should be trained already: name its directory in
    `model.initial_weights`. Teachers are in evaluation mode.

    The official code asks for a learning rate of 1e-4 for the discriminators and .01 for the network, but
    then sets all rates to the network's at each epoch, hence the factor 1.
    """

    def setup(self) -> None:
        self.discriminators = Discriminators(shrink=8)

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        _, terms = cross_entropy_terms(outputs, batch)
        teachers_TxBxK = lax.stop_gradient(jnp.stack([teacher.logits for teacher in batch.teachers]))
        target_BxK = jax.nn.softmax(teachers_TxBxK).mean(0)
        similarity_S = losses.cross_entropy(outputs.logits_SxBxK, target_BxK)
        taps = [[logits] for logits in outputs.logits_SxBxK]
        discriminator_S = self.discriminators(taps, [teachers_TxBxK.mean(0)])[:, 0]
        terms |= per_student("loss_similarity", similarity_S)
        terms |= per_student("loss_discriminator", discriminator_S)
        return similarity_S.sum() + discriminator_S.sum(), terms


def draw_index(key: Array | None, number: int) -> Array | int:
    """Return an integer below `number`, drawn uniformly with the random key of a step.

    The key may be None if there is only one choice.
    """
    if number == 1:
        return 0
    assert key is not None, "drawing needs Batch.key"
    return jax.random.randint(jax.random.fold_in(key, DRAW), (), 0, number)
