"""Export: a network as files for other runtimes, each of which is compared with JAX before it is written."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ekd_jax.common.errors import UserError, nearest, reason
from ekd_jax.common.files import replacing, write_bytes
from ekd_jax.common.records import write_record
from ekd_jax.students.formats import html, onnx_file, openvino, stablehlo
from ekd_jax.students.formats.exportable import Exportable
from ekd_jax.students.formats.onnxruntime_web import NAME, WebRuntime, find_onnxruntime_web
from ekd_jax.students.student import check_output

RECORD = "export.json"
DTYPES = ("float32", "float16")
# The largest difference from JAX, as a share of the standard deviation, over images, of what the network gives.
TOLERANCE = {"float32": 1e-3, "float16": 3e-2}
LARGE_BATCH = 7  # images that a runtime is given at once, after one alone

Files = dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be exported, and what it is compared on.

    Attributes:
        networks: one, or several of equal classes, input and preprocessing.
        dtype: in which the files compute.
        images: (N, H, W, C) uint8.
        onnxruntime_web: directory of that npm package, for pages; None for the usual one.
    """

    networks: tuple[Exportable, ...]
    dtype: str
    images: np.ndarray
    onnxruntime_web: str | os.PathLike[str] | None = None

    @property
    def network(self) -> Exportable:
        """The first network, or the only one."""
        return self.networks[0]

    @property
    def batches(self) -> list[np.ndarray]:
        """The images, one alone and then `LARGE_BATCH` at a time."""
        images = self.images
        return [images[:1], *(images[i : i + LARGE_BATCH] for i in range(1, len(images), LARGE_BATCH))]

    @property
    def inputs(self) -> list[np.ndarray]:
        """The batches as a file takes them."""
        return [self.network.inputs(batch) for batch in self.batches]

    @cached_property
    def web_runtime(self) -> WebRuntime:
        """onnxruntime-web, read from its directory; UserError where it is missing."""
        return find_onnxruntime_web(self.onnxruntime_web)


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        packages: what has to be installed, name of the module -> extra of this package.
        runtime: the package that runs it, whose version is recorded.
        write: what is asked for -> the files, by name.
        run: (the files, what is asked for) -> what the runtime gives for each batch, (B, K), or (S, B, K) of several
            networks.
        dtypes: in which it can compute.
        several: whether its files hold several networks, and prepare images themselves.
        version: what is asked for -> name and version of what runs it, if it is no Python package.
    """

    packages: dict[str, str]
    runtime: str
    write: Callable[[Request], Files]
    run: Callable[[Files, Request], list[np.ndarray]]
    dtypes: tuple[str, ...] = DTYPES
    several: bool = False
    version: Callable[[Request], str] | None = None


ONNX, STABLEHLO = "student.onnx", "student.stablehlo"
FORMATS = {
    "onnx": Format(
        packages={"onnx": "onnx", "onnxruntime": "onnx"},
        runtime="onnxruntime",
        write=lambda asked: {ONNX: onnx_file.write_onnx(asked.network, asked.dtype)},
        run=lambda files, asked: onnx_file.run_onnx(files[ONNX], asked.inputs),
    ),
    "stablehlo": Format(
        packages={},
        runtime="jax",
        write=lambda asked: {STABLEHLO: stablehlo.write_stablehlo(asked.network)},
        run=lambda files, asked: stablehlo.run_stablehlo(files[STABLEHLO], asked.inputs),
        dtypes=("float32",),
    ),
    "openvino": Format(
        packages={"onnx": "openvino", "openvino": "openvino"},
        runtime="openvino",
        write=lambda asked: openvino.write_openvino(onnx_file.write_onnx(asked.network, asked.dtype)),
        run=lambda files, asked: openvino.run_openvino(files, asked.inputs),
    ),
    "html": Format(
        packages={"onnx": "onnx", "onnxruntime": "onnx"},
        runtime=NAME,
        write=lambda asked: {
            html.PAGE: html.write_page(asked.networks, asked.dtype, asked.images, asked.web_runtime)
        },
        run=lambda files, asked: html.run_page(files[html.PAGE], asked.batches),
        several=True,
        version=lambda asked: html.what_runs(asked.web_runtime),
    ),
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A kind of file that was written, and how it was compared with JAX.

    Attributes:
        format: a key of `FORMATS`.
        network: which one; a file may hold several.
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
    network: str
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
        facts: what each file says about itself: classes, input, output, preprocessing, provenance; of several networks,
            what differs is in `networks`.
        compared_on: where the images are from.
        exported: the files.
    """

    network: str
    facts: dict[str, Any]
    compared_on: str
    exported: tuple[Exported, ...]


def check_formats(
    formats: Sequence[str],
    dtype: str,
    several: bool = False,
    with_preprocessing: bool = False,
    onnxruntime_web: str | os.PathLike[str] | None = None,
) -> None:
    """Raise UserError unless all formats are known, can do what is asked for, and what they need is installed.

    Args:
        formats: keys of `FORMATS`.
        dtype: in which the files compute.
        several: whether there are several networks.
        with_preprocessing: whether the files take images as uint8 and give probabilities.
        onnxruntime_web: as in `Request`.
    """
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
        for module, extra in FORMATS[name].packages.items():
            if importlib.util.find_spec(module) is None:
                raise UserError(
                    f"--format={name} needs the package {module}: pip install 'ekd_jax[{extra}]'"
                )
        if several and not FORMATS[name].several:
            can = ", ".join(each for each in FORMATS if FORMATS[each].several)
            raise UserError(f"--format={name} takes one student: name one; --format={can} takes several")
        if with_preprocessing and FORMATS[name].several:
            raise UserError(
                f"--format={name} prepares images itself, and shows probabilities: leave out --with_preprocessing"
            )
    if "html" in formats:
        find_onnxruntime_web(onnxruntime_web)


def export(
    network: Exportable,
    formats: Sequence[str],
    output: pathlib.Path,
    images: np.ndarray,
    compared_on: str,
    dtype: str = "float32",
    beside: Sequence[Exportable] = (),
    onnxruntime_web: str | os.PathLike[str] | None = None,
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
        beside: further networks of the same classes, input and preprocessing, where all formats take several.
        onnxruntime_web: directory of that npm package, for pages; `node_modules/onnxruntime-web` if not given.

    Raises:
        UserError: an unknown format, a package is missing, a runtime differs, or `output` exists.
    """
    check_formats(formats, dtype, bool(beside), network.with_preprocessing, onnxruntime_web)
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
    asked = Request((network, *beside), dtype, images, onnxruntime_web)
    expected = [
        np.concatenate([each.expected(batch) for batch in asked.batches]) for each in asked.networks
    ]
    files: Files = {}
    exported = []
    for name in dict.fromkeys(formats):
        own, found_SxNxK = _written_and_run(name, asked)
        for each, found, logits in zip(asked.networks, found_SxNxK, expected, strict=True):
            exported.append(_compared(name, each, asked, own, found, logits))
        files |= own
    names = ", ".join(each.name for each in asked.networks)
    record = ExportRecord(names, _facts(asked.networks), compared_on, tuple(exported))
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


def _facts(networks: Sequence[Exportable]) -> dict[str, Any]:
    """Return what a file says about itself; of several networks, what differs by their names."""
    first, *others = each = [network.metadata() for network in networks]
    shared = {key: value for key, value in first.items() if all(o.get(key) == value for o in others)}
    if not others:
        return first
    own = [{key: value for key, value in one.items() if key not in shared} for one in each]
    return {**shared, "networks": {n.name: facts for n, facts in zip(networks, own, strict=True)}}


def _written_and_run(name: str, asked: Request) -> tuple[Files, np.ndarray]:
    """Return the files of a format, and what its runtime gives for each network and all images, (S, N, K)."""
    try:
        files = FORMATS[name].write(asked)
        found = np.concatenate(FORMATS[name].run(files, asked), axis=-2)
    except UserError:
        raise
    except Exception as error:  # runtimes raise kinds of their own
        raise UserError(
            f"{asked.network.name} as {name} does not run in {FORMATS[name].runtime} ({reason(error)}); "
            f"nothing was written"
        ) from error
    return files, found.reshape(len(asked.networks), *found.shape[-2:])


def _compared(
    name: str, network: Exportable, asked: Request, files: Files, found: np.ndarray, expected: np.ndarray
) -> Exported:
    """Return the record of a network in a format; raise UserError where its runtime and JAX differ."""
    runtime, version, dtype = FORMATS[name].runtime, FORMATS[name].version, asked.dtype
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
        network=network.name,
        dtype=dtype,
        files=tuple(files),
        sha256=tuple(hashlib.sha256(content).hexdigest() for content in files.values()),
        bytes=sum(map(len, files.values())),
        runtime=version(asked) if version else f"{runtime} {importlib.metadata.version(runtime)}",
        images=len(found),
        difference=difference,
        same_class=int((found.argmax(1) == expected.argmax(1)).sum()),
    )
