"""The setup of a run: everything that follows from its configuration, built once and handed on."""

import dataclasses
import pathlib
from functools import cached_property

import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.common.knob import LARGEST
from ekd_jax.config.build import Networks, build_networks
from ekd_jax.config.resolve import steps_in
from ekd_jax.data.dataset import Source
from ekd_jax.data.labels import make_class_weights
from ekd_jax.data.opening import Data, open_data
from ekd_jax.methods.base import TeacherOutputs
from ekd_jax.runs.describe import describe, describe_data
from ekd_jax.runs.records import RunDescription
from ekd_jax.runs.state import predictor_names
from ekd_jax.runs.teachers import Teacher, load_teachers
from ekd_jax.training.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that follows from a configuration; nothing is compiled.

    Attributes:
        config: the complete configuration.
        mesh: devices that share each batch.
        data: the data set, opened.
        networks: the students and the method that trains them.
        optimizer: with its learning rate schedule.
        teachers: frozen networks that the method learns from.
        taught: shapes of the outputs of each teacher for one image.
        description: of the students, for `students.json`.
        steps: of the whole run.
        class_weights: (K,) weights of the classes in the cross entropy; None: all weigh 1.
    """

    config: FrozenConfigDict
    mesh: Mesh
    data: Data
    networks: Networks
    optimizer: optax.GradientTransformation
    teachers: list[Teacher]
    taught: list[TeacherOutputs]
    description: RunDescription
    steps: int
    class_weights: np.ndarray | None = None

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.data.train)

    @property
    def watched(self) -> str:
        """The set that is evaluated while training, and decides which checkpoint is best."""
        return "test" if self.data.validation is None else "validation"

    @property
    def skips_nonfinite(self) -> bool:
        """Whether a step whose loss or new state is not finite is skipped."""
        return bool(self.config.train.nonfinite == "skip")

    @cached_property
    def names(self) -> list[str]:
        """Names of everything that is evaluated: every student, and last the ensemble."""
        return predictor_names(self.networks)

    @cached_property
    def trained_names(self) -> list[str]:
        """Names of everything whose training accuracy is recorded."""
        return self.networks.method.prediction_names(self.networks.trace.outputs)

    def steps_in(self, epochs: float) -> int:
        """Return the number of steps nearest to a number of epochs; at least one."""
        return steps_in(epochs, self.config, self.examples)

    def epochs(self, step: int) -> float:
        """Return how many epochs have passed after `step` steps."""
        return step * self.config.train.batch_size / self.examples


def prepare(
    config: FrozenConfigDict, mesh: Mesh, path: pathlib.Path = pathlib.Path(), source: Source | None = None
) -> Setup:
    """Open the data and build everything for a run.

    Args:
        config: a complete configuration.
        mesh: devices that share each batch.
        path: directory of the run.
        source: the data set itself, if it is in memory.

    Raises:
        UserError: the data or a teacher is missing, or does not fit.
    """
    data = open_data(config, source)
    classes, shape = data.facts.num_classes, data.facts.input_shape
    check_batches(config, mesh, len(data.train))
    steps = steps_in(config.train.epochs, config, len(data.train))
    networks = build_networks(config, classes, shape, mesh.size)
    teachers = load_teachers(networks.method.teacher_sources, path, data.facts)
    taught = [teacher.shapes() for teacher in teachers]
    description = dataclasses.replace(
        describe(networks, config.model.name, taught),
        class_names=tuple(data.facts.class_names),
        data=describe_data(data),
        teachers=tuple(teacher.info for teacher in teachers),
    )
    optimizer = make_optimizer(config, networks.method, steps)
    return Setup(
        config=config,
        mesh=mesh,
        data=data,
        networks=networks,
        optimizer=optimizer,
        teachers=teachers,
        taught=taught,
        description=description,
        steps=steps,
        class_weights=make_class_weights(config, data),
    )


def class_weights_in_words(setup: Setup) -> str:
    """Return a line with the smallest and the largest class weight, or "" if there are no weights."""
    weights, names = setup.class_weights, setup.data.facts.class_names
    if weights is None:
        return ""
    least, most = int(weights.argmin()), int(weights.argmax())
    return (
        f"class weights from {weights[least]:.3g} ({names[least]}) to {weights[most]:.3g} ({names[most]}) "
        f"(train.class_weights)"
    )


def frozen_in_words(config: FrozenConfigDict) -> str:
    """Return a line that says what of the networks does not learn, or "" if everything does."""
    stages = config.model.frozen_stages
    if stages < 0:
        return ""
    line = f"the stem and {stages} stages do not learn (model.frozen_stages)"
    if config.model.initial_weights:
        return line
    return f"{line}; they keep random values, because model.initial_weights is empty"


def check_batches(config: FrozenConfigDict, mesh: Mesh, examples: int | None) -> None:
    """Raise UserError for a batch that the devices cannot share or that is larger than the data set."""
    accumulation = config.train.accumulation_steps
    parts, what = mesh.size * accumulation, f"{mesh.size} devices"
    if accumulation > 1:
        what += f" x train.accumulation_steps={accumulation}"
    parallel.check_divisible("train.batch_size", config.train.batch_size, parts, what)
    if examples is None:
        return
    if config.train.batch_size > examples:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is above the {examples} training examples"
        )
    steps = steps_in(config.train.epochs, config, examples)
    if steps > LARGEST:
        raise UserError(
            f"train.epochs={config.train.epochs:g} are {steps:,} steps: at most {LARGEST:,} are possible"
        )
