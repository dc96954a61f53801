"""A network as it is exported: it takes images and gives logits, and has everything that a file says about it."""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from ekd_jax.common.records import as_json
from ekd_jax.data.augment import normalize
from ekd_jax.models.platform import ANY, tracing_for
from ekd_jax.students.description import Preprocessing, StudentDescription
from ekd_jax.students.student import LoadedStudent
from ekd_jax.version import __version__

Function = Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Exportable:
    """A network that leaves this package.

    Attributes:
        name: what it is called in messages, such as "student 2".
        logits: normalized images (B, H, W, C) float32 -> logits (B, K) float32.
        input_shape: H, W, C.
        class_names: K names, in the order of the logits.
        preprocessing: what is done to an image first.
        about: further facts for the file.
        with_preprocessing: whether the file takes images (B, H, W, C) uint8 and gives probabilities; otherwise it takes
            normalized images float32 and gives logits.
        student: what is exported, if it is one student.
    """

    name: str
    logits: Function
    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    about: dict[str, Any]
    with_preprocessing: bool = False
    student: LoadedStudent | None = None

    @property
    def input_type(self) -> str:
        """The data type of the images that the file takes."""
        return "uint8" if self.with_preprocessing else "float32"

    @property
    def output(self) -> str:
        """The name of the output of the file: "logits" or "probabilities"."""
        return "probabilities" if self.with_preprocessing else "logits"

    def inputs(self, images: np.ndarray) -> np.ndarray:
        """Return what the file is given for images (B, H, W, C) uint8."""
        return images if self.with_preprocessing else np.asarray(self._normalized(images))

    def compute(self, inputs: Any) -> jax.Array:
        """Return what the file gives, but logits in place of probabilities; may be traced."""
        return self.logits(self._normalized(inputs) if self.with_preprocessing else inputs)

    def expected(self, images: np.ndarray) -> np.ndarray:
        """Return what the file should give for images (B, H, W, C) uint8, computed by JAX in full precision."""
        device = _cpu()
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            return np.asarray(self._jitted(jax.device_put(images, device)))

    def trace(self) -> Any:
        """Trace `compute` for no platform in particular and any number of images; return a closed jaxpr."""
        with tracing_for(ANY):
            return jax.jit(self.compute).trace(self.spec).jaxpr

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        """Shape, with a symbolic number of images, and data type of what the file takes."""
        sizes = ",".join(map(str, self.input_shape))
        return jax.ShapeDtypeStruct(export.symbolic_shape(f"batch,{sizes}"), np.dtype(self.input_type))

    def metadata(self) -> dict[str, Any]:
        """Return what the file says about itself."""
        return {
            "class_names": list(self.class_names),
            "input": f"{self.input_type} (batch, {', '.join(map(str, self.input_shape))}), channels last",
            "output": f"{self.output} (batch, {len(self.class_names)})",
            "preprocessing": {**as_json(self.preprocessing), "in_the_file": self.with_preprocessing},
            "ekd_jax": __version__,
            **self.about,
        }

    @cached_property
    def _jitted(self) -> Any:
        finish = jax.nn.softmax if self.with_preprocessing else lambda logits: logits
        return jax.jit(lambda images: finish(self.logits(self._normalized(images))))

    def _normalized(self, images: Any) -> jax.Array:
        own = self.preprocessing
        return normalize(jnp.asarray(images), own.mean, own.std)


def _cpu() -> jax.Device:
    """Return a CPU, with which other runtimes are compared; JAX's first device where it has none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def exportable_student(student: LoadedStudent, with_preprocessing: bool = False) -> Exportable:
    """Return an extracted student as it is exported. It computes in float32, also if it was trained in bfloat16."""
    own = student.description
    exact: StudentDescription = dataclasses.replace(
        own, network=dataclasses.replace(own.network, dtype="float32")
    )
    student = LoadedStudent(exact, student.variables)
    return Exportable(
        name=f"student {own.student}",
        logits=lambda images: student.network.logits(student.variables, images),
        input_shape=student.input_shape,
        class_names=student.class_names,
        preprocessing=own.preprocessing,
        about={
            "network": as_json(own.network),
            "parameters": str(own.parameters),
            "multiply_accumulates": str(own.macs),
            "provenance": as_json(own.provenance),
            "evaluated_on": own.evaluated_on,
            "metrics": own.metrics,
        },
        with_preprocessing=with_preprocessing,
        student=student,
    )
