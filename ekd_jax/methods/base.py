"""What a method is: a Linen module called on the outputs of a batch.

A method does not know the training loop. It says which parts students share, how the loss is made and
what predicts; whatever else it trains (adaptation layers, gates, discriminators) are its own parameters,
which the train state holds under `method/`. Its fields are its knobs, `config.method.*`.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from ekd_jax.common.errors import UserError, nearest
from ekd_jax.common.knob import Knob, Rule
from ekd_jax.methods import losses
from ekd_jax.models.ensemble import Outputs

Array = jax.Array
Terms = dict[str, Array]

# A teacher named `earlier/<name>` is one of the runs that a method's plan trains first.
EARLIER = "earlier"


@flax.struct.dataclass
class TeacherOutputs:
    """What a frozen teacher says of a batch.

    Attributes:
        logits: (B, K) float32.
        maps: (B, H_b, W_b, C_b) of its stages, in order; none for an ensemble of several students.
        method: the parameters that its own method trained besides (dictionaries, for example).
    """

    logits: Array
    maps: tuple[Array, ...] = ()
    method: Any = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Batch:
    """What a method knows of a training batch beside the students' outputs.

    Attributes:
        labels: (B,) integers, or (B, K) shares of the classes.
        epoch: float32 scalar, passes over the training set before this step.
        key: of what the method draws in this step.
        teachers: of the frozen teachers, in order.
        copies: outputs of the copies of the networks that the method keeps, if it asks for them.
        networks: parameters of the networks, for penalties.
    """

    labels: Array
    epoch: Array
    key: Any = None
    teachers: tuple[TeacherOutputs, ...] = ()
    copies: tuple[Outputs, ...] = ()
    networks: Any = None

    @property
    def classes(self) -> Array:
        """(B,) integers; of mixed images the class with the greatest share."""
        return self.labels.argmax(-1) if self.labels.ndim > 1 else self.labels


def knob(default: Any, meaning: str, rule: Rule = Rule(lambda value: True)) -> Any:  # noqa: B008
    """Return a field of a method's class that is a knob, `method.<field>`.

    Args:
        default: its value in `default_config`.
        meaning: one line that says what it does.
        rule: which values it may have.
    """
    return dataclasses.field(default=default, metadata={"knob": Knob(default, meaning, rule)})


def knobs_of(method: type["Method"]) -> dict[str, Knob]:
    """Return the knobs of a method's class by field; a plain field is a knob without a rule."""
    return {
        field.name: field.metadata.get("knob", Knob(field.default, ""))
        for field in dataclasses.fields(method)
        if field.name not in ("parent", "name")
    }


class Method(nn.Module):
    """A way to train S students together.

    Its fields are its knobs, see `knob`; a value that the field's rule does not allow raises UserError.
    """

    # What students have in common, unless `model.sharing` says otherwise: a "base" block, with as many
    # stages of their own as this (0: as the family has it); a "tree"; or "none".
    sharing: ClassVar[str] = "base"
    own_stages: ClassVar[int] = 0
    trains_networks: ClassVar[bool] = True  # False: the method's own parameters alone learn
    same_beginning: ClassVar[bool] = False  # students of the same width begin with the same values
    compares_copies: ClassVar[bool] = False  # the loss wants the outputs of the kept copies
    has_teachers: ClassVar[bool] = False  # it learns from frozen networks
    uses_teacher_maps: ClassVar[bool] = False  # the loss wants more of teachers than their logits

    def __post_init__(self) -> None:
        for field, own in knobs_of(type(self)).items():
            own.check(f"method.{field}", getattr(self, field))
        super().__post_init__()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        """The loss of one training batch.

        Args:
            outputs: of all students.
            batch: labels, and whatever else the loss may depend on.

        Returns:
            The scalar that is minimized, and the unweighted terms it is made of, scalars named
            `student_<i>/loss_<term>` or `ensemble/loss_<term>`, all of which are logged.
        """
        raise NotImplementedError

    def ensemble_logits(self, outputs: Outputs) -> Array:
        """Logits (B, K) of the ensemble in evaluation mode: the students' mean."""
        return outputs.logits_SxBxK.mean(0)

    def predictions(self, outputs: Outputs) -> list[Array]:
        """Logits (B, K) in evaluation mode of everything that predicts: students, and last the ensemble."""
        return [*outputs.logits_SxBxK, self.ensemble_logits(outputs)]

    def names(self, outputs: Outputs) -> list[str]:
        """Of what `predictions` gives for such outputs."""
        return [*(f"student_{i + 1}" for i in range(len(outputs.logits_SxBxK))), "ensemble"]

    @property
    def base_gradients(self) -> str:
        """Whose gradients reach what is shared: see `Ensemble.base_gradients`."""
        return "all"

    @property
    def learning_rate_scales(self) -> dict[str, float]:
        """Factors on the learning rate for the method's own parameters, by the name of the sub-tree."""
        return {}

    @property
    def separate_views(self) -> bool:
        """Every student gets its own augmentation of the images."""
        return False

    def learners(self, step: Array, students: int) -> Array | None:
        """(S,) booleans: which students learn in this step; None: all of them, always."""
        return None

    def learning_rate(self, config: Any, steps: int) -> Any:
        """An `optax.Schedule` of its own, or None for the one of `config.optimizer`."""
        return None

    # --- copies of the networks, averaged or kept from earlier; they predict instead of the networks ---

    @property
    def copies(self) -> int:
        """How many copies of the networks are kept; with some, they are what is evaluated and taken out."""
        return 0

    def update_copies(self, copies: Any, networks: Any, step: Array, steps: int, epochs: float) -> Any:
        """The copies after a step.

        Args:
            copies: `{"1": variables of the networks, ...}`.
            networks: variables of the networks after the step.
            step: how many steps were taken, this one included.
            steps, epochs: of the whole run.
        """
        return copies

    # --- frozen teachers ---

    @property
    def teacher_sources(self) -> tuple[str, ...]:
        """Folders of the frozen teachers."""
        return ()


def label_terms(outputs: Outputs, labels: Array) -> tuple[Array, Terms]:
    """Sum over students of their cross entropy (L_A), and each one's as a term."""
    ce_S = losses.cross_entropy(outputs.logits_SxBxK, labels)
    return ce_S.sum(), per_student("loss_ce", ce_S)


def per_student(term: str, values_S: Any) -> Terms:
    """`{"student_1/<term>": values[0], ...}`."""
    return {f"student_{i}/{term}": value for i, value in enumerate(values_S, 1)}


def ramp_up(epoch: Array, epochs: float) -> Array:
    """exp(-5 (1 - min(epoch, R) / R)^2), of the whole epochs before; 1 for R = 0 (METHODS.md 2: ONE's
    ramps.py, after Laine & Aila 2017)."""
    if not epochs:
        return jnp.ones((), jnp.float32)
    return jnp.exp(-5 * jnp.square(1 - jnp.minimum(jnp.floor(epoch), epochs) / epochs))


def check_choice(method: Method, name: str, choices: Any) -> None:
    """Raises UserError unless the knob `name` is one of `choices`."""
    value = getattr(method, name)
    if value not in choices:
        raise UserError(f"method.{name}={value!r} is unknown{nearest(str(value), choices)}")


def check_above(method: Method, *names: str, least: float = 0.0) -> None:
    """Raises UserError unless the knobs are above `least`."""
    for name in names:
        if not getattr(method, name) > least:
            raise UserError(f"method.{name}={getattr(method, name):g} must be above {least:g}")


def check_not_negative(method: Method, *names: str) -> None:
    """Raises UserError if one of the knobs is negative."""
    for name in names:
        if not getattr(method, name) >= 0:
            raise UserError(f"method.{name}={getattr(method, name):g} must not be negative")
