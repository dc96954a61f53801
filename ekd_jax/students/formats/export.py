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
from ekd_jax.data.dataset import Example
from ekd_jax.data.decode import Fit, Reader
from ekd_jax.students.formats import onnx_file, onnx_resizing, openvino, pytorch, stablehlo
from ekd_jax.students.formats.exportable import Exportable
from ekd_jax.students.formats.int8 import QuantizationImages, Tried, batches_of, best_quantized
from ekd_jax.students.student import check_output

RECORD = "export.json"
DTYPES = ("float32", "float16")
QUANTIZED = ("int8",)
# The largest difference from JAX, as a share of the standard deviation, over images, of what the network gives.
TOLERANCE = {"float32": 1e-3, "float16": 3e-2}
RESIZED = 3e-2  # the same of an image that the file resizes: pixels may differ from Pillow's by 1 of 255
LARGE_BATCH = 7  # images that a runtime is given at once, after one alone

Files = dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user chooses about the files.

    Attributes:
        dtype: in which they compute, one of `DTYPES`.
        library: of a PyTorch state dict, see `pytorch.write_torch`.
        torch_network: of a PyTorch state dict, see `pytorch.write_torch`.
        quantize: "int8", or "" to compute in `dtype`.
        max_loss: how many points of top-1 that may cost.
        with_resizing: the file takes images of any size.
    """

    dtype: str = DTYPES[0]
    library: str = ""
    torch_network: str = ""
    quantize: str = ""
    max_loss: float = 1.0
    with_resizing: bool = False


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        packages: what has to be installed, name of the module -> extra of this package.
        runtime: the package that runs it, whose version is recorded.
        write: gives the files, by name.
        run: (the files, batches of inputs, channels last) -> what the runtime gives for each.
        check: raises UserError if a network cannot be written with these options.
        dtypes: in which it can compute.
        layout: of images; "NHWC" or "NCHW".
        of_onnx: makes the files of an ONNX file, if that is how they are made.
    """

    packages: dict[str, str]
    runtime: str
    write: Callable[[Exportable, Options], Files]
    run: Callable[[Files, list[np.ndarray]], list[np.ndarray]]
    check: Callable[[Exportable, Options], None] = lambda network, options: None
    dtypes: tuple[str, ...] = DTYPES
    layout: str = "NHWC"
    of_onnx: Callable[[bytes], Files] | None = None


ONNX, STABLEHLO = "student.onnx", "student.stablehlo"
FORMATS = {
    "onnx": Format(
        packages={"onnx": "onnx", "onnxruntime": "onnx"},
        runtime="onnxruntime",
        write=lambda network, options: {ONNX: onnx_file.write_onnx(network, options.dtype)},
        run=lambda files, batches: onnx_file.run_onnx(files[ONNX], batches),
        of_onnx=lambda content: {ONNX: content},
    ),
    "stablehlo": Format(
        packages={},
        runtime="jax",
        write=lambda network, options: {STABLEHLO: stablehlo.write_stablehlo(network)},
        run=lambda files, batches: stablehlo.run_stablehlo(files[STABLEHLO], batches),
        dtypes=("float32",),
    ),
    "openvino": Format(
        packages={"onnx": "openvino", "openvino": "openvino"},
        runtime="openvino",
        write=lambda network, options: openvino.write_openvino(
            onnx_file.write_onnx(network, options.dtype)
        ),
        run=openvino.run_openvino,
        of_onnx=openvino.write_openvino,
    ),
    "torch": Format(
        packages={"torch": "torch"},
        runtime="torch",
        write=lambda network, options: pytorch.write_torch(network, options.library, options.torch_network),
        run=pytorch.run_torch,
        check=lambda network, options: pytorch.check_torch(network, options.library, options.torch_network),
        dtypes=("float32",),
        layout="NCHW",
    ),
}


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What 8-bit integers cost.

    Attributes:
        tried: all recipes on the validation images, the one that was taken first.
        calibrated_on, chosen_on, measured_on: numbers and names of images.
        images: how many were measured on.
        correct: how many of these are classified rightly.
        correct_in_float32: how many are in float32.
        bytes_in_float32: size of the files in float32.
    """

    tried: tuple[Tried, ...]
    calibrated_on: str
    chosen_on: str
    measured_on: str
    images: int
    correct: int
    correct_in_float32: int
    bytes_in_float32: int

    @property
    def loss(self) -> float:
        """Points of top-1 that are lost."""
        return 100 * (self.correct_in_float32 - self.correct) / self.images


@dataclasses.dataclass(frozen=True)
class Resizing:
    """How a file that resizes compares with the same file after Pillow has resized.

    Attributes:
        fit: how it resizes, as `Preprocessing.fit`.
        images: how many images of other sizes it was compared on.
        difference: the largest difference, as a share of the standard deviation.
        same_class: images in the same class.
    """

    fit: str
    images: int
    difference: float
    same_class: int


@dataclasses.dataclass(frozen=True)
class Exported:
    """A kind of file that was written, and how it was compared with JAX.

    Attributes:
        format: a key of `FORMATS`.
        dtype: in which it computes; int8 is compared by accuracy, not by difference.
        layout: of the images that it takes, "NHWC" or "NCHW".
        files: names of its files.
        sha256: of each file, hexadecimal.
        bytes: of all its files.
        runtime: name and version of what ran it.
        images: how many it was compared on, one alone and then `LARGE_BATCH` at a time.
        difference: the largest difference from JAX, as a share of the standard deviation.
        same_class: images that it takes for the same class as JAX.
        quantization: what int8 costs; None of other files.
        resizing: how well it resizes; None of other files.
    """

    format: str
    dtype: str
    layout: str
    files: tuple[str, ...]
    sha256: tuple[str, ...]
    bytes: int
    runtime: str
    images: int
    difference: float
    same_class: int
    quantization: Quantization | None = None
    resizing: Resizing | None = None


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


def check_formats(formats: Sequence[str], options: Options) -> None:
    """Raise UserError unless all formats are known, have these options, and their packages are installed."""
    dtype = options.dtype
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
    for flag in ("library", "torch_network"):
        if getattr(options, flag) and "torch" not in formats:
            raise UserError(f"--{flag} belongs to --format=torch")
    if options.quantize:
        _check_quantize(formats, options)
    if options.with_resizing and (formats != ["onnx"] or dtype != DTYPES[0]):
        raise UserError("--with_resizing is for --format=onnx alone, in float32 or with --quantize=int8")


def _check_quantize(formats: Sequence[str], options: Options) -> None:
    if options.quantize not in QUANTIZED:
        raise UserError(f"--quantize={options.quantize} must be {' or '.join(QUANTIZED)}")
    able = [name for name, own in FORMATS.items() if own.of_onnx]
    for name in formats:
        if name not in able:
            raise UserError(f"--format={name} has no --quantize: {' and '.join(able)} have")
    if options.dtype != DTYPES[0]:
        raise UserError(f"--dtype={options.dtype} and --quantize={options.quantize}: choose one of them")
    if not 0 <= options.max_loss <= 100:
        raise UserError(f"--max_loss={options.max_loss} must be 0 to 100 points of top-1")
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError("--quantize=int8 needs the package onnxruntime: pip install 'ekd_jax[onnx]'")


def export(
    network: Exportable,
    formats: Sequence[str],
    output: pathlib.Path,
    images: np.ndarray,
    compared_on: str,
    options: Options = Options(),
    quantization: QuantizationImages | None = None,
    originals: Sequence[np.ndarray] = (),
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
        options: what the user chose.
        quantization: images to make and to measure int8 with, which `options.quantize` needs.
        originals: images (H', W', C) uint8 of other sizes, which `options.with_resizing` needs.

    Raises:
        UserError: an unknown format, a package is missing, a format cannot hold the network,
            a runtime differs, int8 costs too much, or `output` exists.
    """
    check_formats(formats, options)
    check_output(output)
    for name in formats:
        FORMATS[name].check(network, options)
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
    exported: list[Exported] = []
    int8, tried = b"", tuple[Tried, ...]()  # the same ONNX file for all formats
    for name in dict.fromkeys(formats):
        own, found = _written_and_run(name, network, options, batches)
        written = _compared(name, options.dtype, own, found, expected)
        if options.quantize:
            assert quantization is not None
            if not int8:
                int8, tried = best_quantized(onnx_file.write_onnx(network), network, quantization)
            cost = _cost_of_int8(name, network, own, int8, tried, quantization)
            _check_loss(name, cost, options)
            own = _of_onnx(name, int8)
            found = np.concatenate(FORMATS[name].run(own, [network.inputs(batch) for batch in batches]))
            written = dataclasses.replace(_figures(name, "int8", own, found, expected), quantization=cost)
        if options.with_resizing:
            own, resizing = _resizing(network, own, originals)
            written = dataclasses.replace(_with_files(written, own), resizing=resizing)
        exported.append(written)
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
    name: str, network: Exportable, options: Options, batches: list[np.ndarray]
) -> tuple[Files, np.ndarray]:
    """Return the files of a format, and what its runtime gives for all images."""
    try:
        files = FORMATS[name].write(network, options)
        return files, np.concatenate(FORMATS[name].run(files, [network.inputs(batch) for batch in batches]))
    except UserError:
        raise
    except Exception as error:  # runtimes raise kinds of their own
        raise UserError(
            f"{network.name} as {name} does not run in {FORMATS[name].runtime} ({reason(error)}); nothing was written"
        ) from error


def _compared(name: str, dtype: str, files: Files, found: np.ndarray, expected: np.ndarray) -> Exported:
    """Return the record of a format; raise UserError where its runtime and JAX differ."""
    runtime = FORMATS[name].runtime
    written = _figures(name, dtype, files, found, expected)
    difference = written.difference
    other = _in_other_classes(found, expected, TOLERANCE[dtype])
    if not difference <= TOLERANCE[dtype] or other:  # also if it is not a number
        raise UserError(
            f"{runtime} computes something else from the {name} file: up to {difference:.2g} of the standard "
            f"deviation (at most {TOLERANCE[dtype]:g} is rounding), another class for {other} of {len(found)} images; "
            f"nothing was written"
        )
    return written


def _in_other_classes(found: np.ndarray, expected: np.ndarray, tolerance: float) -> int:
    """Return how many images are in another class. Of classes as good as equal, rounding chooses one."""
    chosen = np.take_along_axis(expected, found.argmax(1)[:, None], 1)[:, 0]
    return int((expected.max(1) - chosen > 2 * tolerance * _deviation(expected)).sum())


def _deviation(outputs: np.ndarray) -> float:
    """Return the standard deviation over images; a bias that all of them share would hide differences."""
    return float(np.sqrt(outputs.var(0).mean())) or float(outputs.std()) or 1.0


def _figures(name: str, dtype: str, files: Files, found: np.ndarray, expected: np.ndarray) -> Exported:
    """Return the record of a format, whatever its figures are."""
    runtime = FORMATS[name].runtime
    own = Exported(
        format=name,
        dtype=dtype,
        layout=FORMATS[name].layout,
        files=(),
        sha256=(),
        bytes=0,
        runtime=f"{runtime} {importlib.metadata.version(runtime)}",
        images=len(found),
        difference=float(np.abs(found - expected).max()) / _deviation(expected),
        same_class=int((found.argmax(1) == expected.argmax(1)).sum()),
    )
    return _with_files(own, files)


def _with_files(own: Exported, files: Files) -> Exported:
    """Return the record of a format with what its files are."""
    return dataclasses.replace(
        own,
        files=tuple(files),
        sha256=tuple(hashlib.sha256(content).hexdigest() for content in files.values()),
        bytes=sum(map(len, files.values())),
    )


def _of_onnx(name: str, content: bytes) -> Files:
    make = FORMATS[name].of_onnx
    assert make is not None
    return make(content)


def _cost_of_int8(
    name: str,
    network: Exportable,
    in_float32: Files,
    content: bytes,
    tried: tuple[Tried, ...],
    images: QuantizationImages,
) -> Quantization:
    """Measure, by the format's own runtime, how many test images int8 classifies rightly, and how many float32."""
    inputs = [network.inputs(batch) for batch in batches_of(images.test.images)]

    def correct(files: Files) -> int:
        found = np.concatenate(FORMATS[name].run(files, inputs))
        return int((found.argmax(1) == images.test.labels).sum())

    return Quantization(
        tried=tried,
        calibrated_on=str(images.calibration),
        chosen_on=str(images.validation),
        measured_on=str(images.test),
        images=len(images.test.images),
        correct=correct(_of_onnx(name, content)),
        correct_in_float32=correct(in_float32),
        bytes_in_float32=sum(map(len, in_float32.values())),
    )


def _check_loss(name: str, cost: Quantization, options: Options) -> None:
    """Raise UserError if int8 costs more than is allowed."""
    if cost.loss > options.max_loss:
        before, after = (100 * n / cost.images for n in (cost.correct_in_float32, cost.correct))
        raise UserError(
            f"{options.quantize} as {name} costs {cost.loss:.2f} points of top-1, {before:.2f} -> {after:.2f} % of "
            f"{cost.measured_on}, with the best of {len(cost.tried)} recipes ({cost.tried[0].recipe}), and "
            f"--max_loss={options.max_loss:g}: nothing was written; leave out --quantize, or allow more"
        )


def _resizing(network: Exportable, files: Files, originals: Sequence[np.ndarray]) -> tuple[Files, Resizing]:
    """Return an ONNX file that resizes, compared with one whose images Pillow has resized."""
    if not network.with_preprocessing:
        raise UserError("--with_resizing needs --with_preprocessing: what is resized are pixels")
    fit: Fit = "crop" if network.preprocessing.fit == "crop" else "stretch"
    read = Reader(network.input_shape, fit)
    run = FORMATS["onnx"].run
    resizing = {ONNX: onnx_resizing.with_resizing(files[ONNX], network.input_shape, fit)}
    found = np.concatenate(run(resizing, [image[None] for image in originals]))
    resized = [read(Example(image, 0, f"number {i}"))[None] for i, image in enumerate(originals)]
    expected = np.concatenate(run(files, resized))
    own = _figures("onnx", "float32", resizing, found, expected)
    others = _in_other_classes(found, expected, RESIZED)
    if not own.difference <= RESIZED or others:
        raise UserError(
            f"--with_resizing: onnxruntime resizes otherwise than Pillow: outputs differ by up to {own.difference:.2g} "
            f"of the standard deviation (at most {RESIZED:g} is rounding), {others} of {own.images} images are in "
            f"another class; nothing was written"
        )
    return resizing, Resizing(fit, own.images, own.difference, own.same_class)
