"""A fresh process that runs an exported file as its users will: without this package."""

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping

import numpy as np

from ekd_jax.common.errors import UserError

LONGEST = 300  # characters of its last line that an error shows
# `network` is what the program before this defines: an array in, an array out.
LAST = """
import numpy
for file in sys.argv[2:]:
    numpy.save(file, numpy.asarray(network(numpy.load(file))))
assert "ekd_jax" not in sys.modules
"""


def run_alone(
    program: str, files: Mapping[str, bytes], batches: list[np.ndarray], search: tuple[str, ...] = ()
) -> list[np.ndarray]:
    """Return what exported files compute on batches of images, in a fresh Python process.

    Args:
        program: Python code that defines a function `network` of arrays; the files are in `sys.argv[1]`.
        files: the exported files, by name.
        batches: what the function is given.
        search: directories in which the process finds modules of the user.

    Raises:
        UserError: the process fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        arrays = [folder / f"{number}.npy" for number in range(len(batches))]
        for array, batch in zip(arrays, batches, strict=True):
            np.save(array, batch)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if search:
            environment["PYTHONPATH"] = os.pathsep.join(search)
        done = subprocess.run(
            [sys.executable, "-c", f"import sys\n{program}{LAST}", folder, *arrays],
            env=environment | {"JAX_PLATFORMS": "cpu"},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1].strip()
            last = last if len(last) <= LONGEST else f"{last[:LONGEST]} ..."
            raise UserError(f"what was exported fails in a process of its own: {last}")
        return [np.load(array) for array in arrays]
