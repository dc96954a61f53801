"""What is trained, on what, for how long: all that follows from a configuration, nothing compiled."""

import dataclasses
import pathlib
from functools import cached_property
from typing import Any

import optax
from jax.sharding import Mesh

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.config.build import make_ensemble, make_method
from ekd_jax.data.opening import Data, open_data
from ekd_jax.methods.base import Method, TeacherOutputs
from ekd_jax.models.ensemble import Ensemble
from ekd_jax.runs.describe import describe
from ekd_jax.runs.state import deployed_names
from ekd_jax.runs.teachers import Teacher, load_teachers
from ekd_jax.training.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, on what, for how long: all that follows from a configuration."""

    config: Any
    mesh: Mesh
    data: Data
    ensemble: Ensemble
    method: Method
    optimizer: optax.GradientTransformation
    teachers: list[Teacher]
    taught: list[TeacherOutputs]  # shapes of what they give for an image
    students: dict[str, Any]  # as students.json
    steps: int

    @property
    def examples(self) -> int:
        return len(self.data.train)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.data.facts.input_shape

    @property
    def watched(self) -> str:
        """What is measured while training, and decides which checkpoint is best."""
        return "test" if self.data.validation is None else "validation"

    @cached_property
    def names(self) -> list[str]:
        """Of all that is evaluated: every student, and last the ensemble."""
        return deployed_names(self.ensemble, self.method, self.input_shape)

    @cached_property
    def learning(self) -> list[str]:
        """The same of what learns."""
        return self.method.prediction_names(self.ensemble.shapes(self.input_shape))

    def epochs(self, step: int) -> float:
        return step * self.config.train.batch_size / self.examples


def prepare(config: Any, mesh: Mesh, path: pathlib.Path = pathlib.Path()) -> Job:
    """Opens the data and builds everything for a run in the folder `path`, compiles nothing."""
    data = open_data(config)
    classes = data.facts.num_classes
    check_batches(config, mesh, len(data.train))
    steps = steps_in(config.train.epochs, config, len(data.train))
    method = make_method(config)
    teachers = load_teachers(method.teacher_sources, path, classes, data.facts.input_shape)
    taught = [teacher.shapes() for teacher in teachers]
    students = describe(config, data.facts.input_shape, classes, taught)
    return Job(
        config=config,
        mesh=mesh,
        data=data,
        ensemble=make_ensemble(config, classes, mesh.size),
        method=method,
        optimizer=make_optimizer(config, method, steps),
        teachers=teachers,
        taught=taught,
        students={
            **students,
            "class_names": list(data.facts.class_names),
            "teachers": [teacher.identity for teacher in teachers],
        },
        steps=steps,
    )


def steps_in(epochs: float, config: Any, examples: int) -> int:
    """Steps nearest to so many epochs, at least one."""
    return max(1, round(epochs * examples / config.train.batch_size))


def check_batches(config: Any, mesh: Mesh, examples: int | None) -> None:
    """Raises UserError for a batch that devices cannot share or that is larger than the data set."""
    parts, what = mesh.size * config.train.accumulation_steps, f"{mesh.size} devices"
    if config.train.accumulation_steps > 1:
        what += f" x train.accumulation_steps={config.train.accumulation_steps}"
    parallel.check_divisible("train.batch_size", config.train.batch_size, parts, what)
    if examples is not None and config.train.batch_size > examples:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is above the {examples} training examples"
        )
