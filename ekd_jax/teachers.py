"""Frozen teachers: networks that are there before training begins, and do not change.

A teacher is a folder that `ekd_jax.extract` or `ekd_jax.convert` wrote, or the folder of a finished run:
its ensemble, or with `RUN:2` its student 2. It runs in evaluation mode, on images normalised its own way;
its variables are arguments of the compiled step, in no optimiser and in no checkpoint.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ekd_jax import parallel
from ekd_jax.config import make_ensemble, make_method
from ekd_jax.data.augment import normalise
from ekd_jax.data.feed import Feed
from ekd_jax.data.resident import Resident, read_all
from ekd_jax.data.sources import Data
from ekd_jax.errors import UserError
from ekd_jax.extract import DESCRIPTION, architecture, load_student
from ekd_jax.methods.base import TeacherOutputs
from ekd_jax.models.ensemble import Variables
from ekd_jax.restore import predictor, restore
from ekd_jax.state import deployed
from ekd_jax.workdir import SUMMARY, read

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
        mean, std: how its images are normalised.
        variables: numpy arrays.
        call: (variables, images (B, H, W, C) normalised) -> logits (B, K) and the maps of its stages.
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
        """What it says of images normalised its way; `frozen` holds its variables on the devices."""
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
        source: folder of a student, or `RUN` or `RUN:student`; `stages/...` is one of the run's own.
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
    path = workdir / name if name.startswith("stages/") else pathlib.Path(name)
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
        variables = restored.ensemble.alone(networks[copy], member + 1)
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


def fixed_images(data: Any) -> bool:
    """Whether an image looks the same in every epoch."""
    drawn = data.crop_padding or data.flip or data.rotation or data.cutout or data.mixup
    return not drawn and data.policy == "none" and data.fit != "crop"


def frozen_inputs(teachers: Sequence[Teacher], config: Any, data: Data, feed: Feed) -> Any:
    """What `make_teach` needs on the devices, as numpy arrays.

    The teachers' variables; or, where an image looks the same in every epoch, the training set is on the
    devices and the method compares logits alone, a table of their logits `{"stored": (N, T, K) float32}`,
    computed once.
    """
    needs_maps = make_method(config).uses_teacher_maps
    if teachers and fixed_images(config.data) and isinstance(feed, Resident) and not needs_maps:
        return {"stored": _logits(teachers, config, data)}
    return {"teachers": [teacher.frozen for teacher in teachers]}


def _logits(teachers: Sequence[Teacher], config: Any, data: Data) -> np.ndarray:
    size, number = min(config.evaluate.batch_size, len(data.train)), len(data.train)

    @jax.jit
    def say(frozen: Any, images: Array) -> Array:
        given = [t(own, normalise(images, t.mean, t.std)) for t, own in zip(teachers, frozen, strict=True)]
        return jnp.stack([outputs.logits for outputs in given], 1)

    images, _ = read_all(data.train, data, range(number))
    parts = []
    with jax.transfer_guard("allow"):
        frozen = jax.device_put([teacher.frozen for teacher in teachers])
        for first in range(0, number, size):
            places = np.arange(first, first + size).clip(max=number - 1)  # one shape, compiled once
            parts.append(np.asarray(say(frozen, images[places])))
    logits: np.ndarray = parallel.from_main(np.concatenate(parts)[:number])
    return logits


def make_teach(teachers: Sequence[Teacher], data: Any) -> Any:
    """A function of (frozen, images normalised as the run's, numbers of the examples) that gives the
    outputs of the teachers; from the table `frozen["stored"]` where there is one."""

    def teach(frozen: Any, images: Array, examples: Array) -> tuple[TeacherOutputs, ...]:
        if "stored" in frozen:
            logits_BxTxK = frozen["stored"][examples]
            return tuple(TeacherOutputs(logits_BxTxK[:, t]) for t in range(logits_BxTxK.shape[1]))
        outputs = []
        for teacher, own in zip(teachers, frozen["teachers"], strict=True):
            outputs.append(teacher(own, _renormalised(images, data, teacher)))
        return lax.stop_gradient(tuple(outputs))

    return teach


def _renormalised(images: Array, data: Any, teacher: Teacher) -> Array:
    """Images as the teacher wants them, from images as the run normalises them."""
    own, its = (np.asarray((d.mean, d.std), np.float64) for d in (data, teacher))
    if np.array_equal(own, its):
        return images
    scale, shift = own[1] / its[1], (own[0] - its[0]) / its[1]
    return images * jnp.asarray(scale, images.dtype) + jnp.asarray(shift, images.dtype)
