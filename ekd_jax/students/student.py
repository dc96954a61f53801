"""A student: one network of a run as a directory that stands alone, to predict with.

The directory holds `weights.safetensors`, `student.json` (network, class names, preprocessing, metrics,
provenance) and `README.md`, a model card for people. Nothing else of this package's training code is needed to use it.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import read_bytes, replacing, why_not_writable, write_bytes
from ekd_jax.common.imports import import_modules
from ekd_jax.common.records import as_record, read_json, write_record
from ekd_jax.data.augment import normalize
from ekd_jax.data.dataset import Example
from ekd_jax.data.decode import MAX_PIXELS, CorruptImageError, Reader, read_image_file
from ekd_jax.models import EnsembleSpec, build
from ekd_jax.models.cost import count_parameters
from ekd_jax.models.ensemble import Ensemble, Student, Variables
from ekd_jax.models.members import Member, parse_width
from ekd_jax.students.card import model_card
from ekd_jax.students.description import FORMAT, StudentDescription
from ekd_jax.students.validation import problem_of_description, problem_of_weights

WEIGHTS, DESCRIPTION, CARD = "weights.safetensors", "student.json", "README.md"


@dataclasses.dataclass(frozen=True)
class LoadedStudent:
    """A student that is ready to predict.

    Attributes:
        description: the record in `student.json`.
        variables: `{"params": {"stem", ..., "head"}, "batch_stats": same}`, numpy arrays.
    """

    description: StudentDescription
    variables: Variables

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names; a label is the place in them."""
        return self.description.class_names

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """H, W, C of the images that it takes."""
        return self.description.network.input_shape

    @cached_property
    def ensemble(self) -> Ensemble:
        """The network as an ensemble of one, without its variables."""
        own = self.description.network
        import_modules(own.imports, f"student {self.description.student}")
        spec = EnsembleSpec(
            name=own.name,
            students=(Member(own.name, tuple(map(parse_width, own.widths))),),
            num_classes=own.num_classes,
            dtype=own.dtype,
            sharing="none",
            **own.options,
        )
        return build(spec)

    @cached_property
    def network(self) -> Student:
        """The network, without its variables."""
        return self.ensemble.student(1)

    def logits(self, images: Any) -> jax.Array:
        """Return the logits (B, K) float32 of images (B, H, W, C) uint8. May be jitted.

        Raises:
            UserError: images of another shape or type.
        """
        images = jnp.asarray(images)
        if images.ndim != 4 or images.shape[1:] != self.input_shape or images.dtype != jnp.uint8:
            wanted = "x".join(map(str, ("B", *self.input_shape)))
            found = "x".join(map(str, images.shape))
            raise UserError(f"the student takes uint8 images {wanted}, not {images.dtype} {found}")
        own = self.description.preprocessing
        return self.network.logits(self.variables, normalize(images, own.mean, own.std))

    def predict(self, images: Any) -> jax.Array:
        """Return class probabilities (B, K) float32 of images (B, H, W, C) uint8.

        It is compiled once per batch size. Errors are those of `logits`.
        """
        return self._predict(images)

    @cached_property
    def _predict(self) -> Any:
        return jax.jit(lambda images: jax.nn.softmax(self.logits(images)))


def load_student(directory: str | os.PathLike[str]) -> LoadedStudent:
    """Load the student in a directory that `extract` or `convert` wrote.

    Everything is checked: the description, the digest of the weights, and that they are finite and fit the network.

    Raises:
        UserError: a file is missing or damaged, or a module that registers the network is missing.
    """
    path = pathlib.Path(directory)
    description = _read_description(path / DESCRIPTION)
    file = path / WEIGHTS
    try:
        data = read_bytes(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({reason(error)}): extract the student again") from error
    if hashlib.sha256(data).hexdigest() != description.weights_sha256:
        raise UserError(f"{file} is damaged (its SHA-256 differs): extract the student again")
    try:
        weights = safetensors.numpy.load(data)
    except Exception as error:  # a header that was tampered with raises many kinds
        raise UserError(f"{file} is damaged ({reason(error)}): extract the student again") from error
    student = LoadedStudent(description, {})
    try:
        trace = student.ensemble.trace(student.input_shape)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a network that its input is too small for raises many kinds
        raise UserError(
            f"{path / DESCRIPTION} is damaged: its network cannot be built ({reason(error)})"
        ) from error
    like = student.ensemble.student_variables(trace.init(None), 1)
    if problem := problem_of_weights(weights, like):
        raise UserError(f"{file} does not fit {path / DESCRIPTION}: {problem}")
    costs = count_parameters(like["params"]), trace.cost(1).macs
    if costs != (description.parameters, description.macs):
        stated = f"{description.parameters:,} parameters and {description.macs:,} multiply-accumulates"
        raise UserError(
            f"{path / DESCRIPTION} is damaged: it states {stated}, its network has {costs[0]:,} and {costs[1]:,}"
        )
    return LoadedStudent(description, unflatten_dict(weights, sep="/"))


def _read_description(path: pathlib.Path) -> StudentDescription:
    """Read and check `student.json`."""
    stored = read_json(path, "a student's directory, as extract writes it")
    found = stored.get("format") if isinstance(stored, dict) else None
    if isinstance(found, int) and found != FORMAT:
        raise UserError(
            f"{path} has format {found}, this version reads {FORMAT}: extract the student again"
        )
    description = as_record(stored, StudentDescription, path)
    if problem := problem_of_description(description):
        raise UserError(f"{path} is damaged: {problem}")
    return description


def read_image(
    path: str | os.PathLike[str], student: LoadedStudent, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Read an image file as (1, H, W, C) uint8, resized as the images were that the student was tested on.

    Args:
        path: of the file.
        student: whose input it becomes.
        max_pixels: largest image that is decoded, in pixels; a small file may claim any size.

    Raises:
        UserError: no such file, or not an image.
    """
    crop = student.description.preprocessing.fit == "crop"
    read = Reader(student.input_shape, "crop" if crop else "stretch", max_pixels)
    try:
        return read(Example(read_image_file(path), 0, os.fspath(path)))[None]
    except CorruptImageError as error:
        raise UserError(error.why) from error


def check_output(output: pathlib.Path, flag: str = "output") -> None:
    """Raise UserError unless `output`, which a flag names, is new or empty, and can be written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--{flag}={output} exists and is not an empty directory: choose another")
    if why := why_not_writable(output):
        raise UserError(f"--{flag}={output}: {why}: choose another")


def write_student(output: pathlib.Path, student: LoadedStudent) -> LoadedStudent:
    """Write a student to the new directory `output`, which appears with all files or not at all.

    Returns:
        The student, whose description has the SHA-256 of its weights.

    Raises:
        UserError: `output` is not empty or cannot be written.
    """
    return write_students(output, {"": student})[""]


def write_students(output: pathlib.Path, students: Mapping[str, LoadedStudent]) -> dict[str, LoadedStudent]:
    """Write students to directories of these names in the new directory `output`, all of them or none.

    For the result and the errors see `write_student`.
    """
    check_output(output)
    files = {name: _as_files(student) for name, student in students.items()}
    try:
        with replacing(output, sum(len(weights) for weights, _ in files.values())) as partial:
            for name, (weights, description) in files.items():
                (partial / name).mkdir(parents=True)
                write_bytes(partial / name / WEIGHTS, weights)
                write_record(partial / name / DESCRIPTION, description)
                card = model_card(description, len(weights) / 1e6)
                write_bytes(partial / name / CARD, card.encode(errors="replace"))
    except OSError as error:
        raise UserError(
            f"cannot write --output={output}: {error.strerror}; nothing of it is left"
        ) from error
    return {name: LoadedStudent(files[name][1], student.variables) for name, student in students.items()}


def _as_files(student: LoadedStudent) -> tuple[bytes, StudentDescription]:
    """Return the content of the file of weights, and the description with its SHA-256."""
    flat = flatten_dict(student.variables, sep="/")
    weights = safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in flat.items()})
    digest = hashlib.sha256(weights).hexdigest()
    return weights, dataclasses.replace(student.description, weights_sha256=digest)
