"""Frozen teachers: networks that are there before training begins, and do not change.

A teacher is a folder that `ekd_jax.extract` or `ekd_jax.convert` wrote, or the folder of a finished run:
its ensemble, or with `RUN:2` its student 2. It runs in evaluation mode, on images normalized its own way;
its variables are arguments of the compiled step, in no optimizer and in no checkpoint.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ekd_jax.common.errors import UserError
from ekd_jax.config.build import make_ensemble
from ekd_jax.methods.base import TeacherOutputs
from ekd_jax.models.ensemble import Variables
from ekd_jax.runs.restore import architecture, predictor, restore
from ekd_jax.runs.state import deployed
from ekd_jax.runs.workdir import SUMMARY, read
from ekd_jax.students.student import DESCRIPTION, load_student

Array = jax.Array
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network, or the ensemble of several.

    Attributes:
        source: where it is from.
        sha256: of its weights.
        num_classes: K.
        input_shape: H, W, C.
        mean, std: how its images are normalized.
        variables: numpy arrays.
        call: (variables, images (B, H, W, C) normalized) -> logits (B, K) and the maps of its stages.
        method: what its own method trained besides, numpy arrays.
    """

    source: str
    sha256: str
    num_classes: int
    input_shape: Shape
    mean: Sequence[float]
    std: Sequence[float]
    variables: Variables
    call: Callable[[Variables, Array], tuple[Array, tuple[Array, ...]]]
    method: Any

    @property
    def identity(self) -> dict[str, Any]:
        return {"source": self.source, "sha256": self.sha256}

    def __call__(self, frozen: Any, images: Array) -> TeacherOutputs:
        """What it says of images normalized its way; `frozen` holds its variables on the devices."""
        logits, maps = self.call(frozen["variables"], images)
        return TeacherOutputs(logits, maps, frozen["method"])

    @property
    def frozen(self) -> Any:
        return {"variables": self.variables, "method": self.method}

    def shapes(self) -> TeacherOutputs:
        """Of what it gives for one image."""
        image = jax.ShapeDtypeStruct((1, *self.input_shape), jnp.float32)
        given: TeacherOutputs = jax.eval_shape(self, self.frozen, image)
        return given


def load_teacher(source: str, workdir: pathlib.Path, knob: str = "method.teachers") -> Teacher:
    """The teacher in a folder.

    Args:
        source: folder of a student, or `RUN` or `RUN:student`; `earlier/...` is one of the run's own.
        workdir: of the run that learns from it.
        knob: that names it, for errors.

    Raises:
        UserError: there is none, or it is not complete.
    """
    path, number = _find(source, workdir, knob)
    if (path / DESCRIPTION).exists():
        return _of_student(path, source)
    return _of_run(path, source, number)


def network_of(source: str, workdir: pathlib.Path) -> dict[str, Any]:
    """What student.json says of a teacher that is one network, or would say: `architecture` and
    `preprocessing`; arguments as of `load_teacher`.

    Raises:
        UserError: there is none, it is not complete, or it is an ensemble.
    """
    path, number = _find(source, workdir)
    if (path / DESCRIPTION).exists():
        return load_student(path).description
    run = read(path)
    config, classes, students = run.config, run.students["num_classes"], len(run.students["students"])
    _check_number(source, number, students)
    if not number and students > 1:
        raise UserError(f"method.teachers: {source} has {students} students: take one of them, {source}:1")
    ensemble = make_ensemble(config, classes)
    member = (int(number or 1) - 1) % len(ensemble.students)
    return {
        "architecture": architecture(run, ensemble, member),
        "preprocessing": {"mean": config.data.mean, "std": config.data.std},
    }


def _find(source: str, workdir: pathlib.Path, knob: str = "method.teachers") -> tuple[pathlib.Path, str]:
    """The folder of a student or of a finished run, and the number of the student, "" without one."""
    name, _, number = source.rpartition(":")
    if not (name and number.isdigit()):
        name, number = source, ""
    path = workdir / name if name.startswith("earlier/") else pathlib.Path(name)
    if not path.is_dir():
        raise UserError(
            f"{knob}: there is no folder {path}: give folders that ekd_jax.extract or "
            f"ekd_jax.convert wrote, or that of a finished run"
        )
    if not any((path / name).exists() for name in (DESCRIPTION, SUMMARY)):
        raise UserError(
            f"{knob}: {path} is neither a student's folder nor that of a finished run: let it "
            f"finish, or take a student out with ekd_jax.extract"
        )
    return path, number


def _check_number(source: str, number: str, students: int) -> None:
    if number and not 1 <= int(number) <= students:
        raise UserError(f"method.teachers: {source}: that run has students 1 to {students}")


def _of_student(path: pathlib.Path, source: str) -> Teacher:
    student = load_student(path)
    own = student.description
    network = student.model

    def call(variables: Variables, images: Array) -> tuple[Array, tuple[Array, ...]]:
        logits, maps, _ = network(variables, images)
        return logits, _stages(maps)

    return Teacher(
        source=source,
        sha256=own["weights_sha256"],
        num_classes=own["architecture"]["num_classes"],
        input_shape=student.input_shape,
        mean=own["preprocessing"]["mean"],
        std=own["preprocessing"]["std"],
        variables=student.variables,
        call=call,
        method={},
    )


def _of_run(path: pathlib.Path, source: str, number: str) -> Teacher:
    restored = restore(path)
    networks = deployed(restored.variables)
    each = len(restored.ensemble.students)
    students = each * len(networks)
    _check_number(source, number, students)
    call: Any
    if number or students == 1:
        copy, member = divmod(int(number or 1) - 1, each)
        variables = restored.ensemble.student_variables(networks[copy], member + 1)
        network = restored.ensemble.student(member + 1)

        def call(variables: Variables, images: Array) -> tuple[Array, tuple[Array, ...]]:
            logits, maps, _ = network(variables, images)
            return logits, _stages(maps)
    else:
        variables = restored.variables
        predict = predictor(restored.ensemble, restored.method)

        def call(variables: Variables, images: Array) -> tuple[Array, tuple[Array, ...]]:
            return predict(variables, images)[-1], ()

    config = restored.run.config
    digests = json.dumps([number, restored.digests], sort_keys=True)
    return Teacher(
        source=source,
        sha256=hashlib.sha256(digests.encode()).hexdigest(),
        num_classes=restored.run.students["num_classes"],
        input_shape=tuple(restored.run.students["input_shape"]),
        mean=config.data.mean,
        std=config.data.std,
        variables=variables,
        call=call,
        method=restored.variables["params"]["method"],
    )


def _stages(maps: dict[str, Array]) -> tuple[Array, ...]:
    return tuple(maps[name] for name in sorted(maps) if name.startswith("stage"))


def load_teachers(
    sources: Sequence[str], workdir: pathlib.Path, num_classes: int, input_shape: Shape
) -> list[Teacher]:
    """Teachers that fit the data.

    Raises:
        UserError: one is missing, or knows other classes or images of another size.
    """
    teachers = [load_teacher(source, workdir) for source in sources]
    for teacher in teachers:
        check_fit(teacher.source, teacher.num_classes, teacher.input_shape, num_classes, input_shape)
    return teachers


def check_fit(
    source: str, classes: int, images: Shape, num_classes: int, input_shape: Sequence[int]
) -> None:
    """Raises UserError unless a teacher's classes and images are those of the data."""
    for what, own, wanted in (
        ("classes", classes, num_classes),
        ("images", images, tuple(input_shape)),
    ):
        if own != wanted:
            raise UserError(
                f"method.teachers: {source} was trained for {what} {_text(own)}, the data has "
                f"{_text(wanted)}: take a teacher of the same"
            )


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
