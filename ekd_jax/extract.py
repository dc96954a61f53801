"""Takes one student out of a run, as a folder that stands alone; also a command.

    python -m ekd_jax.extract --workdir=RUN --student=5 --output=DIR [--step=N | --best]
    python -m ekd_jax.extract --workdir=RUN --max_parameters=50000 --output=DIR

The folder holds `weights.safetensors` and `student.json` (architecture, class names, preprocessing,
metrics, provenance). `ekd_jax.load_student(DIR)` makes a model of it.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict

from ekd_jax import __version__, checkpoint, commands, models
from ekd_jax.config import identity, make_ensemble, make_method, network_options
from ekd_jax.data.augment import normalise
from ekd_jax.errors import UserError, reason
from ekd_jax.models.ensemble import Ensemble, Student, Variables, parse_member
from ekd_jax.state import deployed
from ekd_jax.workdir import Run, read
from ekd_jax.writers import read_metrics, write_json

FLAGS = flags.FLAGS
WEIGHTS, DESCRIPTION = "weights.safetensors", "student.json"
FORMAT = 4


@dataclasses.dataclass(frozen=True)
class LoadedStudent:
    """A student that was taken out: ready to predict.

    Attributes:
        description: what student.json says.
        variables: `{"params": {"stem", ..., "head"}, "batch_stats": same}`, numpy arrays.
    """

    description: dict[str, Any]
    variables: Variables

    @property
    def class_names(self) -> list[str]:
        names: list[str] = self.description["class_names"]
        return names

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """H, W, C."""
        h, w, c = self.description["architecture"]["input_shape"]
        return h, w, c

    @property
    def fit(self) -> str:
        """How images of other sizes are brought to `input_shape`: as `data.fit`."""
        return str(self.description["preprocessing"]["fit"])

    @cached_property
    def model(self) -> Student:
        """The network."""
        own = self.description["architecture"]
        ensemble = models.build(
            own["name"],
            (parse_member(own),),
            own["num_classes"],
            own["dtype"],
            sharing="none",
            **own["options"],
        )
        return ensemble.student(1)

    def logits(self, images: Any) -> jax.Array:
        """(B, H, W, C) uint8 -> (B, K) float32. Can be jitted.

        Raises:
            UserError: images of another shape or type.
        """
        images = jnp.asarray(images)
        if images.ndim != 4 or images.shape[1:] != self.input_shape or images.dtype != jnp.uint8:
            wanted = "x".join(map(str, ("B", *self.input_shape)))
            found = "x".join(map(str, images.shape))
            raise UserError(f"the student takes uint8 images {wanted}, not {images.dtype} {found}")
        own = self.description["preprocessing"]
        return self.model.logits(self.variables, normalise(images, own["mean"], own["std"]))

    def predict(self, images: Any) -> jax.Array:
        """(B, H, W, C) uint8 -> class probabilities (B, K) float32; compiled once a shape."""
        return self._jitted(images)

    @cached_property
    def _jitted(self) -> Any:
        return jax.jit(lambda images: jax.nn.softmax(self.logits(images)))


def load_student(folder: str | os.PathLike[str]) -> LoadedStudent:
    """The student in a folder that `extract` wrote.

    Raises:
        UserError: a missing or damaged file.
    """
    path = pathlib.Path(folder)
    try:
        description = json.loads((path / DESCRIPTION).read_text())
        data = (path / WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a folder that ekd_jax.extract wrote: {reason(error)}") from error
    if description.get("format") != FORMAT:
        raise UserError(
            f"{path / DESCRIPTION} has format {description.get('format')}, this version reads {FORMAT}"
        )
    if hashlib.sha256(data).hexdigest() != description["weights_sha256"]:
        raise UserError(f"{path / WEIGHTS} is damaged (its SHA-256 differs): extract the student again")
    variables = unflatten_dict(safetensors.numpy.load(data), sep="/")
    return LoadedStudent(description, variables)


def architecture(run: Run, ensemble: Ensemble, member: int) -> dict[str, Any]:
    """What makes the network of a run's student anew; `member` counts the ensemble's students from 0."""
    return {
        "name": ensemble.students[member].network or run.config.model.name,
        "widths": [str(width) for width in ensemble.widths[member]],
        "num_classes": run.students["num_classes"],
        "input_shape": run.students["input_shape"],
        "dtype": run.config.train.dtype,
        "options": network_options(run.config),
    }


def extract(
    workdir: pathlib.Path,
    student: int,
    output: pathlib.Path,
    step: int | None = None,
    best: bool = False,
) -> dict[str, Any]:
    """Writes student `student` (from 1) of a run to the new folder `output`.

    Only what the student is made of is read from the checkpoint.

    Args:
        workdir: of the run.
        student: 1..S.
        output: must not exist, or be an empty folder.
        step: of the checkpoint; the latest if not given.
        best: of the kept checkpoints the one in which this student did best on the test set.

    Returns:
        What student.json says.

    Raises:
        UserError: no such student, step or run; `output` not empty or not writable.
    """
    run = read(workdir)
    config, students = run.config, run.students["students"]
    if not 1 <= student <= len(students):
        raise UserError(f"--student={student}: {workdir} has students 1 to {len(students)}")
    check_output(output)
    ensemble = make_ensemble(config, run.students["num_classes"])
    copy, member = divmod(student - 1, len(ensemble.students))
    with checkpoint.opened(workdir) as checkpoints:
        step = checkpoints.choose(step, f"student_{student}/top1" if best else None)
        shapes = checkpoints.shapes(step)
        networks = deployed(shapes)[copy]
        like = {kind: ensemble.paths(networks[kind], member + 1) for kind in ("params", "batch_stats")}
        kept = bool(make_method(config).copies)
        where = {"copies": {str(copy + 1): like}} if kept else like
        restored, remembered = checkpoints.restore_variables(where, step)
    variables = restored["copies"][str(copy + 1)] if kept else restored
    own, name = students[student - 1], f"student_{student}/"
    description = {
        "architecture": {**architecture(run, ensemble, member), "channels": own["widths"]},
        "student": student,
        "parameters": own["parameters"],
        "macs": own["macs"],
        "class_names": run.students["class_names"],
        "preprocessing": {
            "formula": "(image / 255 - mean) / std",
            "mean": list(config.data.mean),
            "std": list(config.data.std),
            "fit": config.data.fit,
            "image_size": config.data.image_size,
        },
        "evaluated_on": remembered["evaluated_on"],
        "metrics": {
            key.removeprefix(name): value
            for key, value in (remembered["evaluation"] or {}).items()
            if key.startswith(name)
        },
        "provenance": {
            **identity(config),
            "test_split": config.data.test_split,
            "step": step,
            "epoch": remembered["epoch"],
            "ekd_jax": __version__,
        },
    }
    return write_student(output, ensemble.alone(variables, member + 1), description)


def fitting_student(workdir: pathlib.Path, max_parameters: int) -> int:
    """The student with at most so many parameters that did best in the run's last evaluation.

    Raises:
        UserError: none is small enough.
    """
    students = read(workdir).students["students"]
    small = [s for s in students if s["parameters"] <= max_parameters]
    if not small:
        least = min(s["parameters"] for s in students)
        raise UserError(f"--max_parameters={max_parameters}: the smallest student has {least}")
    records = {record["split"]: record for record in read_metrics(workdir)}  # the last of each
    last: dict[str, Any] = records.get("validation", records.get("test", {}))
    best = max(small, key=lambda s: (last.get(f"student_{s['student']}/top1", 0.0), s["parameters"]))
    return int(best["student"])


def check_output(output: pathlib.Path) -> None:
    """Raises UserError unless `output` is new or empty, and can be written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output} exists and is not an empty folder: choose another")
    parent = next(p for p in output.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        raise UserError(f"--output={output}: {parent} is not a writable folder: choose another")


def write_student(
    output: pathlib.Path, variables: Variables, description: dict[str, Any]
) -> dict[str, Any]:
    """Writes a student to the new folder `output`, which appears with both files or not at all.

    Args:
        output: checked by `check_output`.
        variables: `{"params": {"stem", ..., "head"}, "batch_stats": same}`.
        description: what student.json is to say, but for its format and the weights' SHA-256.

    Returns:
        What student.json says.

    Raises:
        UserError: `output` cannot be written.
    """
    flat = flatten_dict(variables, sep="/")
    weights = safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in flat.items()})
    description = {"format": FORMAT, **description, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    partial = output.absolute().with_name(f".{output.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        (partial / WEIGHTS).write_bytes(weights)
        write_json(partial / DESCRIPTION, description)
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"cannot write --output={output}: {reason(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return description


def main() -> None:
    """The command."""
    workdir = pathlib.Path(FLAGS.workdir)
    if (FLAGS.student is None) == (FLAGS.max_parameters is None):
        raise UserError("pass --student=N, or --max_parameters=N for the best student that fits")
    if FLAGS.step is not None and FLAGS.best:
        raise UserError("pass --step=N or --best, not both")
    student = FLAGS.student or fitting_student(workdir, FLAGS.max_parameters)
    description = extract(workdir, student, pathlib.Path(FLAGS.output), FLAGS.step, FLAGS.best)
    accuracy = description["metrics"].get("top1")
    print(
        f"student {student} of {workdir} at step {description['provenance']['step']} -> {FLAGS.output}: "
        f"{description['parameters']:,} parameters"
        + (f", {accuracy:.2f} % top-1" if accuracy is not None else "")
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    flags.DEFINE_string("output", None, "new folder to write", required=True)
    flags.DEFINE_integer("student", None, "which student, from 1")
    flags.DEFINE_integer("max_parameters", None, "the best student with at most so many parameters")
    flags.DEFINE_integer("step", None, "step of the checkpoint; the latest if not given")
    flags.DEFINE_boolean("best", False, "the kept checkpoint in which the student did best")
    commands.run(main)
