"""StableHLO: a program that JAX itself loads, in a process that does not have this package."""

import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
from jax import export

from ekd_jax.common.errors import UserError
from ekd_jax.models.platform import ANY, tracing_for
from ekd_jax.students.formats.exportable import Exportable

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM = """
import sys
import jax, numpy
network = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
for file in sys.argv[2:]:
    numpy.save(file, numpy.asarray(network.call(numpy.load(file))))
assert "ekd_jax" not in sys.modules
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
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "program").write_bytes(content)
        files = [folder / f"{number}.npy" for number in range(len(batches))]
        for file, batch in zip(files, batches, strict=True):
            np.save(file, batch)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-c", f"import jax.export{PROGRAM}", folder / "program", *files],
            env=environment | {"JAX_PLATFORMS": "cpu"},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the exported program fails in a process of its own: {last}")
        return [np.load(file) for file in files]
