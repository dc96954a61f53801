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


def run_stablehlo(content: bytes, batches: list[np.ndarray]) -> list[np.ndarray]:
    """Return what the program computes on batches of images, on a CPU, in a fresh process.

    Raises:
        UserError: the process fails.
    """
    return run_alone(PROGRAM, {"program": content}, batches)
