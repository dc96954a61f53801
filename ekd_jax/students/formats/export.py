"""Export: a network as files for other runtimes, each of which is compared with JAX before it is written."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ekd_jax.common.errors import UserError, nearest, reason
from ekd_jax.common.files import replacing, write_bytes
from ekd_jax.common.records import write_record
from ekd_jax.students.formats import onnx_file, openvino, stablehlo
from ekd_jax.students.formats.exportable import Exportable
from ekd_jax.students.formats.onnx_file import UnwritableError
from ekd_jax.students.student import check_output

RECORD = "export.json"
DTYPES = ("float32", "float16")
# The largest difference from JAX, as a share of the standard deviation, over images, of what the network gives.
TOLERANCE = {"float32": 1e-3, "float16": 3e-2}
LARGE_BATCH = 7  # images that a runtime is given at once, after one alone

Files = dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        packages: what has to be installed, name of the module -> extra of this package.
        runtime: the package that runs it, whose version is recorded.
        write: (network, dtype) -> the files, by name.
        run: (the files, batches of inputs) -> what the runtime gives for each.
        dtypes: in which it can compute.
    """

    packages: dict[str, str]
    runtime: str
    write: Callable[[Exportable, str], Files]
    run: Callable[[Files, list[np.ndarray]], list[np.ndarray]]
    dtypes: tuple[str, ...] = DTYPES


ONNX, STABLEHLO = "student.onnx", "student.stablehlo"
FORMATS = {
    "onnx": Format(
        packages={"onnx": "onnx", "onnxruntime": "onnx"},
        runtime="onnxruntime",
        write=lambda network, dtype: {ONNX: onnx_file.write_onnx(network, dtype)},
        run=lambda files, batches: onnx_file.run_onnx(files[ONNX], batches),
    ),
    "stablehlo": Format(
        packages={},
        runtime="jax",
        write=lambda network, dtype: {STABLEHLO: stablehlo.write_stablehlo(network)},
        run=lambda files, batches: stablehlo.run_stablehlo(files[STABLEHLO], batches),
        dtypes=("float32",),
    ),
    "openvino": Format(
        packages={"onnx": "openvino", "openvino": "openvino"},
        runtime="openvino",
        write=lambda network, dtype: openvino.write_openvino(onnx_file.write_onnx(network, dtype)),
        run=openvino.run_openvino,
    ),
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A kind of file that was written, and how it was compared with JAX.

    Attributes:
        format: a key of `FORMATS`.
        dtype: in which it computes.
        files: names of its files.
        sha256: of each file, hexadecimal.
        bytes: of all its files.
        runtime: name and version of what ran it.
        images: how many it was compared on, one alone and then `LARGE_BATCH` at a time.
        difference: the largest difference from JAX, as a share of the standard deviation.
        same_class: images that it takes for the same class as JAX.
    """

    format: str
    dtype: str
    files: tuple[str, ...]
    sha256: tuple[str, ...]
    bytes: int
    runtime: str
    images: int
    difference: float
    same_class: int


@dataclasses.dataclass(frozen=True)
class ExportRecord:
    """The record of an export; `export.json`.

    Attributes:
        network: what was exported.
        facts: what each file says about itself: classes, input, output, preprocessing, provenance.
        compared_on: where the images are from.
        exported: the files.
    """

    network: str
    facts: dict[str, Any]
    compared_on: str
    exported: tuple[Exported, ...]


def check_formats(formats: Sequence[str], dtype: str) -> None:
    """Raise UserError unless all formats are known, can compute in `dtype`, and their packages are installed."""
    if not formats:
        raise UserError(f"--format is empty: name one or several of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} must be one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--format={name} is not known{nearest(name, FORMATS)}")
        if dtype not in FORMATS[name].dtypes:
            raise UserError(
                f"--format={name} has no --dtype={dtype}: {', '.join(FORMATS[name].dtypes)} is what it computes in"
            )
        if lacks := missing_package(name):
            raise UserError(f"--format={name} needs {lacks}")


def missing_package(name: str) -> str:
    """Return which package a format lacks, and how to install it; "" if it lacks none."""
    for module, extra in FORMATS[name].packages.items():
        if importlib.util.find_spec(module) is None:
            return f"the package {module}: pip install 'ekd_jax[{extra}]'"
    return ""


def export(
    network: Exportable,
    formats: Sequence[str],
    output: pathlib.Path,
    images: np.ndarray,
    compared_on: str,
    dtype: str = "float32",
) -> ExportRecord:
    """Write a network in several formats to a new directory, all of them or none, with a record beside them.

    Every format is run by its own runtime first and compared with JAX: the same classes, and no difference above
    `TOLERANCE`.

    Args:
        network: what is exported.
        formats: keys of `FORMATS`.
        output: new directory.
        images: (N, H, W, C) uint8, on which they are compared.
        compared_on: where these are from, for the record.
        dtype: in which the files compute.

    Raises:
        UserError: an unknown format, a package is missing, a runtime differs, or `output` exists.
    """
    check_formats(formats, dtype)
    check_output(output)
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[1:] != network.input_shape
        or not len(images)
    ):
        wanted = "x".join(map(str, ("N", *network.input_shape)))
        given = "x".join(map(str, images.shape))
        raise UserError(f"to compare, pass uint8 images {wanted}, at least one, not {images.dtype} {given}")
    batches = [images[:1], *(images[i : i + LARGE_BATCH] for i in range(1, len(images), LARGE_BATCH))]
    expected = np.concatenate([network.expected(batch) for batch in batches])
    files: Files = {}
    exported = []
    for name in dict.fromkeys(formats):
        own, found = _written_and_run(name, network, dtype, batches)
        exported.append(_compared(name, dtype, own, found, expected))
        files |= own
    record = ExportRecord(network.name, network.metadata(), compared_on, tuple(exported))
    try:
        with replacing(output, sum(map(len, files.values()))) as partial:
            partial.mkdir(parents=True)
            for file, content in files.items():
                write_bytes(partial / file, content)
            write_record(partial / RECORD, record)
    except OSError as error:
        raise UserError(
            f"cannot write --output={output}: {error.strerror}; nothing of it is left"
        ) from error
    return record


def _written_and_run(
    name: str, network: Exportable, dtype: str, batches: list[np.ndarray]
) -> tuple[Files, np.ndarray]:
    """Return the files of a format, and what its runtime gives for all images."""
    try:
        files = FORMATS[name].write(network, dtype)
        return files, np.concatenate(FORMATS[name].run(files, [network.inputs(batch) for batch in batches]))
    except UnwritableError as error:
        raise UserError(f"{error}; --format=stablehlo takes every network") from error
    except UserError:
        raise
    except Exception as error:  # runtimes raise kinds of their own
        raise UserError(
            f"{network.name} as {name} does not run in {FORMATS[name].runtime} ({reason(error)}); nothing was written"
        ) from error


def _compared(name: str, dtype: str, files: Files, found: np.ndarray, expected: np.ndarray) -> Exported:
    """Return the record of a format; raise UserError where its runtime and JAX differ."""
    runtime = FORMATS[name].runtime
    over_images = float(np.sqrt(expected.var(0).mean()))  # a bias that all images share hides differences
    deviation = over_images or float(expected.std()) or 1.0
    difference = float(np.abs(found - expected).max()) / deviation
    # Where two classes are as good as equal, rounding decides between them.
    allowed = 2 * TOLERANCE[dtype] * deviation
    chosen = np.take_along_axis(expected, found.argmax(1)[:, None], 1)[:, 0]
    other = int((expected.max(1) - chosen > allowed).sum())
    if not difference <= TOLERANCE[dtype] or other:  # also if it is not a number
        raise UserError(
            f"{runtime} computes something else from the {name} file: up to {difference:.2g} of the standard "
            f"deviation (at most {TOLERANCE[dtype]:g} is rounding), another class for {other} of {len(found)} images; "
            f"nothing was written"
        )
    return Exported(
        format=name,
        dtype=dtype,
        files=tuple(files),
        sha256=tuple(hashlib.sha256(content).hexdigest() for content in files.values()),
        bytes=sum(map(len, files.values())),
        runtime=f"{runtime} {importlib.metadata.version(runtime)}",
        images=len(found),
        difference=difference,
        same_class=int((found.argmax(1) == expected.argmax(1)).sum()),
    )
