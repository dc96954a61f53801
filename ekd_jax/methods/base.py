"""The base class of all methods: a Linen module that is called with the outputs of a batch.

A method does not know the training loop. It says which parts of their networks students share, computes the
loss of a batch, and says what predicts. Whatever else it trains (adaptation layers, gates, discriminators)
is its own sub-modules, whose parameters the train state holds under `method/`. Its fields are its knobs,
`config.method.<field>`.
"""

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from ekd_jax.common.knob import Knob, Rule
from ekd_jax.methods import losses
from ekd_jax.models.ensemble import Outputs, Variables

Array = jax.Array
Terms = dict[str, Array]
Copies = dict[str, Variables]

# A teacher named `earlier/<name>` is one of the runs that a method's plan trains first.
EARLIER = "earlier"


@flax.struct.dataclass
class TeacherOutputs:
    """The outputs of a frozen teacher for a batch.

    Attributes:
        logits: (B, K) float32.
        maps: feature maps (B, H_b, W_b, C_b) of its stages, in order; none if the teacher is an ensemble.
        method: parameters that the teacher's own method trained besides its network, such as dictionaries.
    """

    logits: Array
    maps: tuple[Array, ...] = ()
    method: dict[str, Any] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Batch:
    """Everything that a loss may depend on besides the students' outputs.

    Attributes:
        labels: (B,) integers, or (B, K) shares of the classes (mixed images, smoothed labels).
        epoch: float32 scalar, passes over the training set before this step.
        key: random key of this step, for methods that draw something.
        teachers: outputs of the frozen teachers, in order.
        copy_outputs: outputs of the copies of the networks, if the method asks for them
            (`Method.uses_copy_outputs`).
        networks: parameters of the networks, for penalties on them.
        class_weights: (K,) weights of the classes in the cross entropy of the labels; None: all weigh 1.
    """

    labels: Array
    epoch: Array
    key: Array | None = None
    teachers: tuple[TeacherOutputs, ...] = ()
    copy_outputs: tuple[Outputs, ...] = ()
    networks: dict[str, Any] = flax.struct.field(default_factory=dict)
    class_weights: Array | None = None

    def cross_entropy(self, logits: Array) -> Array:
        """Return the cross entropy of the labels for logits (..., B, K), with the classes' weights; (...)."""
        return losses.cross_entropy(logits, self.labels, self.class_weights)

    @property
    def classes(self) -> Array:
        """The class of each image, (B,) integers; the one with the largest share if labels are mixed."""
        return self.labels.argmax(-1) if self.labels.ndim > 1 else self.labels


def knob(default: Any, meaning: str, rule: Rule = Rule(lambda value: True)) -> Any:  # noqa: B008
    """Return a field of a method's class that is a knob, `config.method.<field>`.

    A subclass changes the default with a plain `field: type = value`; meaning and rule stay.

    Args:
        default: the value unless a configuration sets another; its type is the type of all values.
        meaning: one sentence that says what the knob does. `ekd knobs` prints it.
        rule: which values are allowed.
    """
    return dataclasses.field(default=default, metadata={"knob": Knob(default, meaning, rule)})


def knobs_of(method: type["Method"]) -> dict[str, Knob]:
    """Return the knobs of a method's class, by field.

    A field without `knob` has the meaning and rule of the base class's field of the same name, or none.
    """
    fields = (field for field in dataclasses.fields(method) if field.name not in ("parent", "name"))
    return {field.name: _knob_of(method, field) for field in fields}


def _knob_of(method: type["Method"], field: dataclasses.Field[Any]) -> Knob:
    for base in method.__mro__:
        declared = base.__dict__.get("__dataclass_fields__", {}).get(field.name)
        if declared is not None and "knob" in declared.metadata:
            return dataclasses.replace(declared.metadata["knob"], default=field.default)
    return Knob(field.default, "")


class Method(nn.Module):
    """A way to train S students together.

    To write a method: derive a class, declare its knobs as fields (see `knob`), implement `__call__`, and
    register it with `ekd_jax.methods.register_method`. Everything else has a default. Layers that the
    method trains besides the networks are sub-modules, created in `setup`.

    Attributes:
        sharing: what students have in common unless `model.sharing` says otherwise: one "base" block; a
            "tree" of shared parts; or "none", so that each is a whole network.
        own_stages: with a base block, how many of the last stages each student has of its own; 0: as many
            as the network's family prescribes.
        trains_networks: False if the networks stay as they are and only the method's own parameters learn.
        same_initial_values: whether students of equal width start from the same initial values.
        uses_copy_outputs: whether the loss reads `Batch.copy_outputs`.
        separate_views: whether each student gets its own augmentation of the images.
        has_teachers: whether students learn from frozen teachers.
        part_of: the method whose plan trains its earlier runs by this one; lists of methods leave such
            parts out. Empty for a method that is used by itself.

    Raises:
        UserError: a knob has a value that its rule does not allow.
    """

    sharing: ClassVar[str] = "base"
    own_stages: ClassVar[int] = 0
    trains_networks: ClassVar[bool] = True
    same_initial_values: ClassVar[bool] = False
    uses_copy_outputs: ClassVar[bool] = False
    separate_views: ClassVar[bool] = False
    has_teachers: ClassVar[bool] = False
    part_of: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field, own in knobs_of(type(self)).items():
            own.check(f"method.{field}", getattr(self, field))
        super().__post_init__()

    @classmethod
    def summary(cls) -> str:
        """Return the first paragraph of the documentation of the class, in one line."""
        return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        """Compute the loss of a training batch.

        Args:
            outputs: outputs of all students, in training mode.
            batch: labels, and everything else that the loss may depend on.

        Returns:
            The scalar to minimize; and the terms that it consists of, unweighted scalars named
            `student_<i>/loss_<term>` or `ensemble/loss_<term>`. All terms are logged.
        """
        raise NotImplementedError

    # --- predictions ---

    def ensemble_logits(self, outputs: Outputs) -> Array:
        """Return the logits (B, K) of the ensemble in evaluation mode; the students' mean by default."""
        return outputs.logits_SxBxK.mean(0)

    def predictions(self, outputs: Outputs) -> list[Array]:
        """Return the logits (B, K) of all that predicts in evaluation mode: students, the ensemble last."""
        return [*outputs.logits_SxBxK, self.ensemble_logits(outputs)]

    def prediction_names(self, outputs: Outputs) -> list[str]:
        """Return the names of what `predictions` returns for such outputs, in the same order."""
        return [*(f"student_{i + 1}" for i in range(len(outputs.logits_SxBxK))), "ensemble"]

    # --- how students learn ---

    @property
    def base_gradients(self) -> str:
        """Which students' gradients train the shared parts: see `Ensemble.base_gradients`."""
        return "all"

    @property
    def learning_rate_scales(self) -> dict[str, float]:
        """Factors on the learning rate of the method's own parameters, by the name of the sub-module."""
        return {}

    def learning_students(self, step: Array, students: int) -> Array | None:
        """Return which students learn in a step, (S,) booleans; None if all of them always do.

        Args:
            step: steps taken before this one.
            students: S.
        """
        return None

    def learning_rate_schedule(
        self, learning_rate: float, steps: int, epochs: float
    ) -> optax.Schedule | None:
        """Return the method's own schedule; None to use the one that `config.optimizer` describes.

        Args:
            learning_rate: `optimizer.learning_rate`.
            steps: number of steps of the whole run.
            epochs: passes over the training set of the whole run.
        """
        return None

    # --- copies of the networks: averaged, or kept from an earlier step ---

    @property
    def number_of_copies(self) -> int:
        """Number of copies of the networks that the method keeps. If there are any, they are evaluated and
        extracted instead of the networks that learn."""
        return 0

    def update_copies(
        self, copies: Copies, networks: Variables, step: Array, steps: int, epochs: float
    ) -> Copies:
        """Return the copies after a step. All of them start as the networks do.

        Args:
            copies: `{"1": variables of the networks, ...}`.
            networks: variables of the networks after the step.
            step: number of steps taken, this one included.
            steps: number of steps of the whole run.
            epochs: passes over the training set of the whole run.
        """
        return copies

    # --- frozen teachers ---

    @property
    def teacher_sources(self) -> tuple[str, ...]:
        """Paths of the frozen teachers, in order: directories, or `RUN:2` for student 2 of a run."""
        return ()

    @property
    def uses_teacher_maps(self) -> bool:
        """True if the loss reads the teachers' feature maps, not only their logits."""
        return False


def cross_entropy_terms(outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
    """Return the sum of the students' cross entropies, L_A, and each of them as a term `loss_ce`."""
    ce_S = batch.cross_entropy(outputs.logits_SxBxK)
    return ce_S.sum(), per_student("loss_ce", ce_S)


def per_student(term: str, values_S: Array | Iterable[Array]) -> Terms:
    """Return one value per student as terms, `{"student_1/<term>": values[0], ...}`."""
    return {f"student_{i}/{term}": value for i, value in enumerate(values_S, 1)}


def ramp_up(epoch: Array, epochs: float) -> Array:
    """Return a weight that rises from exp(-5) to 1, smoothly at first.

        exp(-5 (1 - min(floor(epoch), R) / R)^2)

    Args:
        epoch: scalar, passes over the training set so far.
        epochs: R; 0: the weight is 1 from the start.

    Returns:
        A float32 scalar.

    References:
        Laine, Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017, arXiv 1610.02242; as in
        ONE's official code, utils/ramps.py (docs/reference/kd_losses.md#ramp-up).
    """
    if not epochs:
        return jnp.ones((), jnp.float32)
    return jnp.exp(-5 * jnp.square(1 - jnp.minimum(jnp.floor(epoch), epochs) / epochs))
