"""TODO: students.student."""

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
from flax.traverse_util import flatten_dict, unflatten_dict

from ekd_jax import models
from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import write_json
from ekd_jax.data.augment import normalize
from ekd_jax.data.dataset import Example
from ekd_jax.data.decode import CorruptImageError, Reader
from ekd_jax.models.ensemble import Student, Variables
from ekd_jax.models.members import parse_member

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
        spec = models.EnsembleSpec(
            own["name"],
            (parse_member(own),),
            own["num_classes"],
            own["dtype"],
            sharing="none",
            **own["options"],
        )
        return models.build(spec).student(1)

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
        return self.model.logits(self.variables, normalize(images, own["mean"], own["std"]))

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


def read_image(path: pathlib.Path, student: LoadedStudent) -> np.ndarray:
    """The image as (1, H, W, C) uint8, brought to its size as images to test on were.

    Raises:
        UserError: no such file, or not an image.
    """
    read = Reader(student.input_shape, "crop" if student.fit == "crop" else "stretch")
    try:
        return read(Example(path.read_bytes(), 0, str(path)))[None]
    except (OSError, CorruptImageError) as error:
        why = reason(error.__cause__ or error)
        raise UserError(f"cannot read an image from --image={path}: {why}") from error
