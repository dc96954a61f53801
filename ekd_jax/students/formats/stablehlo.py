"""StableHLO: a program that JAX itself loads, in a process that does not have this package."""

import jax
import numpy as np
from jax import export

from ekd_jax.models.platform import ANY, tracing_for
from ekd_jax.students.formats.alone import run_alone
from ekd_jax.students.formats.exportable import Exportable

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM = """
import jax.export
network = jax.export.deserialize(bytearray(open(sys.argv[1] + "/program", "rb").read())).call
"""


def write_stablehlo(network: Exportable) -> bytes:
    """Return a program for CPUs, GPUs and TPUs, for any number of images.

    `jax.export.deserialize(bytearray(content)).call(images)` runs it.
    """

    def result(images: jax.Array) -> jax.Array:
        outputs = network.compute(images)
        return jax.nn.softmax(outputs) if network.with_preprocessing else outputs

    with tracing_for(ANY):
        program = export.export(jax.jit(result), platforms=PLATFORMS)(network.spec)
    return bytes(program.serialize())


def write_program(network: Exportable, batch_size: int, target: str) -> bytes:
    """Return the program that `jax.jit` makes of a network on one platform, for one number of images.

    Args:
        network: what is exported.
        batch_size: number of images.
        target: platform as `jax.export` names it, such as "cpu" or "cuda"; it need not be there.
    """

    def result(
        images: jax.Array,
    ) -> jax.Array:  # new each time: JAX keeps what it traced, for whatever platform
        return network.compute(images)

    images = jax.ShapeDtypeStruct((batch_size, *network.input_shape), np.dtype(network.input_type))
    with tracing_for({"cuda": "gpu", "rocm": "gpu"}.get(target, target)):
        program = export.export(jax.jit(result), platforms=[target])(images)
    return bytes(program.serialize())


def run_stablehlo(content: bytes, batches: list[np.ndarray]) -> list[np.ndarray]:
    """Return what the program computes on batches of images, on a CPU, in a fresh process.

    Raises:
        UserError: the process fails.
    """
    return run_alone(PROGRAM, {"program": content}, batches)
