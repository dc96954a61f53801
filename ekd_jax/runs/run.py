"""A run, read back from its directory: its configuration, its networks, and what they learned."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from ekd_jax.common.errors import UserError
from ekd_jax.common.log import logger
from ekd_jax.common.records import read_record
from ekd_jax.config.build import Networks, build_networks, network_options
from ekd_jax.config.resolve import identity, read_config, settings, steps_in
from ekd_jax.data.augment import normalize
from ekd_jax.data.dataset import Source
from ekd_jax.data.opening import open_data
from ekd_jax.methods import METHODS
from ekd_jax.models.ensemble import Variables
from ekd_jax.runs.checkpoint import open_checkpoints
from ekd_jax.runs.describe import describe_data
from ekd_jax.runs.evaluation import (
    Evaluation,
    Predict,
    Predictors,
    evaluate_predictors,
    evaluate_student,
    with_class_scores,
    with_data,
)
from ekd_jax.runs.metrics import read_metrics
from ekd_jax.runs.records import A_RUN, CONFIG, STUDENTS, RunDescription
from ekd_jax.runs.state import (
    deployed_method_variables,
    deployed_variables,
    joined_outputs,
    predictor_names,
)
from ekd_jax.runs.workdir import check_one_run, check_same_data
from ekd_jax.students.description import NetworkDescription, Preprocessing, Provenance, StudentDescription
from ekd_jax.students.student import LoadedStudent, write_student
from ekd_jax.version import __version__


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The variables that a run had learned at a step.

    Attributes:
        step: step of the checkpoint.
        variables: all that predictions depend on, numpy arrays.
        digests: SHA-256 of every array of the checkpoint, by its path.
    """

    step: int
    variables: Variables
    digests: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, read back from its directory. Checkpoints are read when they are first needed.

    Attributes:
        path: its directory.
        config: its complete configuration.
        description: its students and classes.
        step: which checkpoint is used; the latest if None.
        best: use the kept checkpoint with the highest top-1 of the ensemble, or of the student asked for.
    """

    path: pathlib.Path
    config: FrozenConfigDict
    description: RunDescription
    step: int | None = None
    best: bool = False

    @cached_property
    def networks(self) -> Networks:
        """Its networks and its method."""
        own = self.description
        return build_networks(self.config, own.num_classes, own.input_shape)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Everything in its checkpoint that predictions depend on.

        Raises:
            UserError: no such checkpoint, or it is damaged.
        """
        with open_checkpoints(self.path) as checkpoints:
            step = checkpoints.choose(self.step, "ensemble/top1" if self.best else None)
            shapes = checkpoints.shapes(step)
            like = {kind: shapes.get(kind, {}) for kind in ("params", "batch_stats", "copies")}
            variables, remembered = checkpoints.restore_variables(like, step)
        for kind in ("params", "batch_stats"):
            variables[kind].setdefault("method", {})
        return Checkpoint(step, variables, remembered["sha256"])

    @cached_property
    def names(self) -> list[str]:
        """The names of everything that predicts: `student_1`, ..., and last `ensemble`."""
        return predictor_names(self.networks)

    def logits(self, images: Any) -> jax.Array:
        """Return logits (P, B, K) float32 of all predictors, in the order of `names`.

        Args:
            images: (B, H, W, C) uint8.

        Raises:
            UserError: images of another shape or type.
        """
        images = jnp.asarray(images)
        shape = self.description.input_shape
        if images.ndim != 4 or images.shape[1:] != shape or images.dtype != jnp.uint8:
            wanted, found = ("x".join(map(str, s)) for s in (("B", *shape), images.shape))
            raise UserError(f"the run takes uint8 images {wanted}, not {images.dtype} {found}")
        return self._logits(self.checkpoint.variables, images)

    @cached_property
    def _logits(self) -> Any:
        predict, data = make_predict(self.networks), self.config.data
        return jax.jit(lambda variables, images: predict(variables, normalize(images, data.mean, data.std)))

    def predict(self, images: Any) -> dict[str, jax.Array]:
        """Return class probabilities (B, K) of every student and of the ensemble, by name.

        For the arguments and errors see `logits`.
        """
        return dict(zip(self.names, jax.nn.softmax(self.logits(images)), strict=True))

    def evaluate(
        self,
        split: str = "test",
        data: Mapping[str, str | None] | None = None,
        source: Source | None = None,
        confusion: bool = False,
    ) -> Evaluation:
        """Evaluate every student and the ensemble.

        Args:
            split: "test", "train", "validation" for the images that the run held out, or "all".
            data: knobs of the section `data` that differ: `data_dir` and `manual_dir` if the data is not where the
                run had it, `name` to evaluate on another set, `corrupt="skip"` to leave out images that cannot be
                read.
            source: the data set itself, if it is in memory.
            confusion: also count images by class and predicted class.

        Returns:
            Metrics by name, `student_1/top1` and so on.

        Raises:
            UserError: the data is missing, has a class that the run does not have, or, with split="validation",
                is not the data that the run held its validation images out of.
        """
        own = self.description
        config = with_data(self.config, data or {}, own.input_shape)
        if split == "validation":
            now = open_data(config, source)
            check_same_data(self.path, own, now.facts.class_names, describe_data(now))
        predictors = Predictors(
            call=make_predict(self.networks),
            variables=self.checkpoint.variables,
            names=self.names,
            class_names=own.class_names,
            input_shape=own.input_shape,
        )
        return evaluate_predictors(predictors, config, split, source, confusion)

    def student(self, number: int) -> LoadedStudent:
        """Return student `number`, from 1; nothing else is read from the checkpoint.

        Raises:
            UserError: no such student or checkpoint, or the checkpoint is damaged.
        """
        networks, config = self.networks, self.config
        if not 1 <= number <= networks.students:
            raise UserError(f"--student={number}: {self.path} has students 1 to {networks.students}")
        ensemble, name = networks.ensemble, f"student_{number}/"
        copy, member = divmod(number - 1, len(ensemble.students))
        with open_checkpoints(self.path) as checkpoints:
            step = checkpoints.choose(self.step, f"{name}top1" if self.best else None)
            trained = deployed_variables(checkpoints.shapes(step))[copy]
            like = {
                kind: ensemble.student_subtrees(trained[kind], member + 1)
                for kind in ("params", "batch_stats")
            }
            kept = bool(networks.number_of_copies)
            where = {"copies": {str(copy + 1): like}} if kept else like
            restored, remembered = checkpoints.restore_variables(where, step)
        variables = restored["copies"][str(copy + 1)] if kept else restored
        info = self.description.students[number - 1]
        measured, data = (remembered["evaluation"] or {}).items(), self.description.data
        description = StudentDescription(
            network=self.network_of(member),
            student=number,
            parameters=info.parameters,
            macs=info.macs,
            class_names=self.description.class_names,
            preprocessing=self.preprocessing,
            provenance=Provenance(
                **identity(config),
                test_split=config.data.test_split,
                method_summary=METHODS[config.method.name].summary(),
                settings=settings(config),
                train_examples=data.train_examples if data else 0,
                steps=steps_in(config.train.epochs, config, data.train_examples) if data else 0,
                epochs=config.train.epochs,
                step=step,
                epoch=remembered["epoch"],
                version=__version__,
            ),
            evaluated_on=remembered["evaluated_on"],
            metrics={key.removeprefix(name): value for key, value in measured if key.startswith(name)},
            examples=getattr(data, f"{remembered['evaluated_on']}_examples", 0),
        )
        return LoadedStudent(description, ensemble.student_variables(variables, member + 1))

    def with_class_scores(self, student: LoadedStudent) -> LoadedStudent:
        """Return a student of this run with its scores on the test images of each class.

        Raises:
            UserError: the data is missing.
        """
        places = {name: self.config.data[name] for name in ("data_dir", "manual_dir")}
        return with_class_scores(student, evaluate_student(student, places))

    def with_scores_if_known(self, student: LoadedStudent) -> LoadedStudent:
        """Return `with_class_scores`, or the student as it is, with a warning, where the test images are missing."""
        try:
            return self.with_class_scores(student)
        except UserError as error:
            logger.warning(f"the model card gets no scores by class: {error}")
            return student

    def extract(
        self, student: int, output: str | os.PathLike[str], per_class: bool = False
    ) -> LoadedStudent:
        """Write a student to a new directory; see `student` and `students.student.write_student`.

        Args:
            student: its number, from 1.
            output: the new directory.
            per_class: evaluate it on the test images, for the scores by class on its model card.

        Raises:
            UserError: as `student` and `write_student`; with `per_class`, the data is missing.
        """
        own = self.student(student)
        return write_student(pathlib.Path(output), self.with_class_scores(own) if per_class else own)

    def network_of(self, member: int) -> NetworkDescription:
        """Describe the network of a member of the ensemble, counted from 0."""
        ensemble, config = self.networks.ensemble, self.config
        return NetworkDescription(
            name=ensemble.students[member].network or config.model.name,
            widths=tuple(str(width) for width in ensemble.widths[member]),
            num_classes=self.description.num_classes,
            input_shape=self.description.input_shape,
            dtype=config.train.dtype,
            options=network_options(config),
            channels=self.description.students[member].channels,
            imports=config.imports,
        )

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of an image."""
        data = self.config.data
        return Preprocessing(tuple(data.mean), tuple(data.std), data.fit, data.image_size)

    def best_student_within(self, max_parameters: int) -> int:
        """Return the student that did best among those with at most `max_parameters`, in the last evaluation.

        Raises:
            UserError: none is small enough.
        """
        students = self.description.students
        small = [s for s in students if s.parameters <= max_parameters]
        if not small:
            least = min(s.parameters for s in students)
            raise UserError(f"--max_parameters={max_parameters}: the smallest student has {least}")
        records = {record["split"]: record for record in read_metrics(self.path)}  # the last of each split
        last: dict[str, Any] = records.get("validation", records.get("test", {}))
        return max(small, key=lambda s: (last.get(f"student_{s.student}/top1", 0.0), s.parameters)).student


def load_run(workdir: str | os.PathLike[str], step: int | None = None, best: bool = False) -> Run:
    """Read a run back from its directory; it may still be training.

    Args:
        workdir: the run's directory.
        step: which checkpoint to use; the latest if not given.
        best: use the best of the kept checkpoints instead.

    Raises:
        UserError: it is not the directory of a run, or a module of the user that it needs is missing.
    """
    path = pathlib.Path(workdir)
    check_one_run(path)
    config = read_config(path / CONFIG, A_RUN)
    description = read_record(path / STUDENTS, RunDescription, A_RUN)
    numbers = [student.student for student in description.students]
    if numbers != [*range(1, len(numbers) + 1)] or len(description.class_names) != description.num_classes:
        raise UserError(f"{path / STUDENTS} is damaged: its students or its classes are not complete")
    return Run(path, config, description, step, best)


def make_predict(networks: Networks) -> Predict:
    """Make a function (variables, normalized images) -> logits (P, B, K) of everything that predicts.

    Its rows are named by `state.predictor_names`.
    """
    method, ensemble = networks.method, networks.ensemble

    def predict(variables: Variables, images: jax.Array) -> jax.Array:
        each = [ensemble.apply(v, images, train=False)[0] for v in deployed_variables(variables)]
        outputs = joined_outputs(each)
        predictions: Any = method.apply(deployed_method_variables(variables), outputs, method="predictions")
        return jnp.stack(predictions)

    return predict
