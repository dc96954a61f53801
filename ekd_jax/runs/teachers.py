"""Frozen teachers: networks that exist before training starts and do not change.

A teacher is a student's directory, as `extract` or `convert` writes it, or the directory of a complete run: its
ensemble, or with `RUN:2` its student 2. It runs in evaluation mode, on images normalized its own way. Its
variables are arguments of the compiled step; they are in no optimizer and in no checkpoint.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ekd_jax.common.errors import UserError
from ekd_jax.data.classes import check_same_classes, label_map
from ekd_jax.data.dataset import Facts
from ekd_jax.methods.base import EARLIER, TeacherOutputs
from ekd_jax.models.ensemble import Student, Variables
from ekd_jax.runs.records import SUMMARY, TeacherInfo
from ekd_jax.runs.run import Run, load_run, make_predict
from ekd_jax.runs.state import deployed_method_variables, deployed_variables
from ekd_jax.runs.workdir import check_one_run
from ekd_jax.students.description import NetworkDescription, Preprocessing
from ekd_jax.students.student import DESCRIPTION, load_student

Array = jax.Array
Shape = tuple[int, ...]
Call = Callable[[Variables, Array], tuple[Array, tuple[Array, ...]]]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network, or a frozen ensemble of several.

    Attributes:
        info: where it is from, and the SHA-256 of its weights.
        class_names: names of its K classes, in the order of its logits.
        input_shape: H, W, C.
        preprocessing: how its images are normalized.
        variables: numpy arrays.
        call: (variables, images (B, H, W, C) normalized) -> logits (B, K) and the feature maps of its stages.
        method: parameters that its own method trained besides, numpy arrays.
    """

    info: TeacherInfo
    class_names: tuple[str, ...]
    input_shape: Shape
    preprocessing: Preprocessing
    variables: Variables
    call: Call
    method: Any

    def __call__(self, frozen: Any, images: Array) -> TeacherOutputs:
        """Return its outputs for images normalized its way; `frozen` holds its variables on the devices."""
        logits, maps = self.call(frozen["variables"], images)
        return TeacherOutputs(logits, maps, frozen["method"])

    @property
    def frozen(self) -> Any:
        """The arrays that must be on the devices to call this teacher."""
        return {"variables": self.variables, "method": self.method}

    def shapes(self) -> TeacherOutputs:
        """Return the shapes of its outputs for one image."""
        image = jax.ShapeDtypeStruct((1, *self.input_shape), jnp.float32)
        given: TeacherOutputs = jax.eval_shape(self, self.frozen, image)
        return given

    def with_classes(self, class_names: Sequence[str]) -> "Teacher":
        """Return the teacher with its logits in the order of other class names.

        Raises:
            UserError: one of the classes is unknown to it.
        """
        names, call = tuple(class_names), self.call
        if names == self.class_names:
            return self
        columns = np.array(label_map(names, self.class_names, "the data", self.info.source))

        def reordered(variables: Variables, images: Array) -> tuple[Array, tuple[Array, ...]]:
            logits, maps = call(variables, images)
            return logits[:, columns], maps

        return dataclasses.replace(self, class_names=names, call=reordered)


def load_teachers(sources: Sequence[str], workdir: pathlib.Path, facts: Facts) -> list[Teacher]:
    """Load teachers that fit the data; their logits are in the order of its classes.

    Raises:
        UserError: one is missing, or was trained for other classes or images of another size.
    """
    teachers = [load_teacher(source, workdir) for source in sources]
    for teacher in teachers:
        check_fit(teacher.info.source, teacher.class_names, teacher.input_shape, facts)
    return [teacher.with_classes(facts.class_names) for teacher in teachers]


def load_teacher(source: str, workdir: pathlib.Path, knob: str = "method.teachers") -> Teacher:
    """Load the teacher in a directory.

    Args:
        source: a student's directory, `RUN`, or `RUN:student`; `earlier/...` is a run of the run's own plan.
        workdir: of the run that learns from it.
        knob: the knob that names it, for errors.

    Raises:
        UserError: there is none, or the run is not complete.
    """
    path, number = _find(source, workdir, knob)
    if (path / DESCRIPTION).exists():
        return _from_student(path, source)
    return _from_run(load_run(path), source, number)


class OneNetwork(NamedTuple):
    """A teacher that is one network, without its weights.

    Attributes:
        network: the network.
        preprocessing: how its images are normalized.
        class_names: names of its classes, in the order of its logits.
    """

    network: NetworkDescription
    preprocessing: Preprocessing
    class_names: tuple[str, ...]


def network_of(source: str, workdir: pathlib.Path) -> OneNetwork:
    """Describe a teacher that is one network, without loading it; for the arguments see `load_teacher`.

    Raises:
        UserError: there is none, the run is not complete, or the teacher is an ensemble.
    """
    path, number = _find(source, workdir)
    if (path / DESCRIPTION).exists():
        student = load_student(path).description
        return OneNetwork(student.network, student.preprocessing, student.class_names)
    run = load_run(path)
    students = run.networks.students
    _check_number(source, number, students)
    if not number and students > 1:
        raise UserError(f"method.teachers: {source} has {students} students: take one of them, {source}:1")
    member = (int(number or 1) - 1) % len(run.networks.ensemble.students)
    return OneNetwork(run.network_of(member), run.preprocessing, run.description.class_names)


def check_fit(source: str, class_names: Sequence[str], input_shape: Shape, facts: Facts) -> None:
    """Raise UserError unless a teacher has the classes of the data, in any order, and takes its images."""
    check_same_classes(facts.class_names, class_names, "the data", f"method.teachers: {source}")
    if tuple(input_shape) != facts.input_shape:
        own, wanted = ("x".join(map(str, shape)) for shape in (input_shape, facts.input_shape))
        raise UserError(
            f"method.teachers: {source} was trained for images {own}, the data has {wanted}: "
            f"use a teacher that was trained for the same"
        )


def _find(source: str, workdir: pathlib.Path, knob: str = "method.teachers") -> tuple[pathlib.Path, str]:
    """Return the directory of a student or of a complete run, and the number of the student, "" without one."""
    name, _, number = source.rpartition(":")
    if not (name and number.isdecimal()):
        name, number = source, ""
    path = workdir / name if name.startswith(f"{EARLIER}/") else pathlib.Path(name)
    check_one_run(path)
    if not path.is_dir():
        raise UserError(
            f"{knob}: there is no directory {path}: give a student's directory, as extract or convert writes "
            f"it, or that of a complete run"
        )
    if not any((path / name).exists() for name in (DESCRIPTION, SUMMARY)):
        raise UserError(
            f"{knob}: {path} is neither a student's directory nor that of a complete run: let it "
            f"finish, or extract a student"
        )
    return path, number


def _check_number(source: str, number: str, students: int) -> None:
    if number and not 1 <= int(number) <= students:
        raise UserError(f"method.teachers: {source}: that run has students 1 to {students}")


def _from_student(path: pathlib.Path, source: str) -> Teacher:
    student = load_student(path)
    own = student.description
    return Teacher(
        info=TeacherInfo(source, own.weights_sha256),
        class_names=student.class_names,
        input_shape=student.input_shape,
        preprocessing=own.preprocessing,
        variables=student.variables,
        call=_call_network(student.network),
        method={},
    )


def _from_run(run: Run, source: str, number: str) -> Teacher:
    ensemble, learned = run.networks.ensemble, run.checkpoint
    students = run.networks.students
    _check_number(source, number, students)
    if number or students == 1:
        copy, member = divmod(int(number or 1) - 1, len(ensemble.students))
        variables = ensemble.student_variables(deployed_variables(learned.variables)[copy], member + 1)
        call = _call_network(ensemble.student(member + 1))
    else:
        variables, predict = learned.variables, make_predict(run.networks)

        def call(variables: Variables, images: Array) -> tuple[Array, tuple[Array, ...]]:
            return predict(variables, images)[-1], ()

    digests = json.dumps([number, learned.digests], sort_keys=True)
    return Teacher(
        info=TeacherInfo(source, hashlib.sha256(digests.encode()).hexdigest()),
        class_names=run.description.class_names,
        input_shape=run.description.input_shape,
        preprocessing=run.preprocessing,
        variables=variables,
        call=call,
        method=deployed_method_variables(learned.variables)["params"],
    )


def _call_network(network: Student) -> Call:
    def call(variables: Variables, images: Array) -> tuple[Array, tuple[Array, ...]]:
        logits, maps, _ = network(variables, images)
        return logits, tuple(maps[name] for name in sorted(maps) if name.startswith("stage"))

    return call
