"""The formats: how a network is written in each, what runs it there, and what that needs."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence

import numpy as np

from ekd_jax.common.errors import UserError, nearest
from ekd_jax.students.formats import html, onnx_file, openvino, pytorch, stablehlo
from ekd_jax.students.formats.onnxruntime_web import NAME, find_onnxruntime_web
from ekd_jax.students.formats.request import DTYPES, Options, Request

QUANTIZED = ("int8",)
Files = dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        packages: what has to be installed, name of the module -> extra of this package.
        runtime: the package that runs it, whose version is recorded.
        write: what is asked for -> the files, by name.
        run: (the files, batches of inputs, channels last) -> what the runtime gives for each, (B, K), or (S, B, K) of
            several networks.
        check: raises UserError if what is asked for cannot be written.
        dtypes: in which it can compute.
        layout: of images; "NHWC" or "NCHW".
        of_onnx: makes the files of an ONNX file, if that is how they are made.
        several: whether its files hold several networks, and prepare images (B, H, W, C) uint8 themselves.
        version: what is asked for -> name and version of what runs it, if it is no Python package.
    """

    packages: dict[str, str]
    runtime: str
    write: Callable[[Request], Files]
    run: Callable[[Files, list[np.ndarray]], list[np.ndarray]]
    check: Callable[[Request], None] = lambda asked: None
    dtypes: tuple[str, ...] = DTYPES
    layout: str = "NHWC"
    of_onnx: Callable[[bytes], Files] | None = None
    several: bool = False
    version: Callable[[Request], str] | None = None


ONNX, STABLEHLO = "student.onnx", "student.stablehlo"
FORMATS = {
    "onnx": Format(
        packages={"onnx": "onnx", "onnxruntime": "onnx"},
        runtime="onnxruntime",
        write=lambda asked: {ONNX: onnx_file.write_onnx(asked.network, asked.options.dtype)},
        run=lambda files, batches: onnx_file.run_onnx(files[ONNX], batches),
        of_onnx=lambda content: {ONNX: content},
    ),
    "stablehlo": Format(
        packages={},
        runtime="jax",
        write=lambda asked: {STABLEHLO: stablehlo.write_stablehlo(asked.network)},
        run=lambda files, batches: stablehlo.run_stablehlo(files[STABLEHLO], batches),
        dtypes=("float32",),
    ),
    "openvino": Format(
        packages={"onnx": "openvino", "openvino": "openvino"},
        runtime="openvino",
        write=lambda asked: openvino.write_openvino(
            onnx_file.write_onnx(asked.network, asked.options.dtype)
        ),
        run=openvino.run_openvino,
        of_onnx=openvino.write_openvino,
    ),
    "torch": Format(
        packages={"torch": "torch"},
        runtime="torch",
        write=pytorch.write_torch,
        run=pytorch.run_torch,
        check=pytorch.check_torch,
        dtypes=("float32",),
        layout="NCHW",
    ),
    "html": Format(
        packages={"onnx": "onnx", "onnxruntime": "onnx"},
        runtime=NAME,
        write=lambda asked: {
            html.PAGE: html.write_page(asked.networks, asked.options.dtype, asked.images, asked.web_runtime)
        },
        run=lambda files, batches: html.run_page(files[html.PAGE], batches),
        several=True,
        version=lambda asked: html.what_runs(asked.web_runtime),
    ),
}


def check_formats(
    formats: Sequence[str], options: Options, several: bool = False, with_preprocessing: bool = False
) -> None:
    """Raise UserError unless all formats are known, can do what is asked for, and what they need is installed.

    Args:
        formats: keys of `FORMATS`.
        options: what the user chose.
        several: whether there are several networks.
        with_preprocessing: whether the files take images as uint8 and give probabilities.
    """
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
        if lacks := missing_package(name):
            raise UserError(f"--format={name} needs {lacks}")
        if several and not FORMATS[name].several:
            can = ", ".join(each for each in FORMATS if FORMATS[each].several)
            raise UserError(f"--format={name} takes one student: name one; --format={can} takes several")
        if with_preprocessing and FORMATS[name].several:
            raise UserError(
                f"--format={name} prepares images itself, and shows probabilities: leave out --with_preprocessing"
            )
    for flag in ("library", "torch_network"):
        if getattr(options, flag) and "torch" not in formats:
            raise UserError(f"--{flag} belongs to --format=torch")
    if options.onnxruntime_web is not None and "html" not in formats:
        raise UserError("--onnxruntime_web belongs to --format=html")
    if "html" in formats:
        find_onnxruntime_web(options.onnxruntime_web)
    if options.quantize:
        _check_quantize(formats, options)
    if options.with_resizing and (list(formats) != ["onnx"] or dtype != DTYPES[0]):
        raise UserError("--with_resizing is for --format=onnx alone, in float32 or with --quantize=int8")


def missing_package(name: str) -> str:
    """Return which package a format lacks, and how to install it; "" if it lacks none."""
    for module, extra in FORMATS[name].packages.items():
        if importlib.util.find_spec(module) is None:
            return f"the package {module}: pip install 'ekd_jax[{extra}]'"
    return ""


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
    if lacks := missing_package("onnx"):  # which quantizes, whatever the format
        raise UserError(f"--quantize={options.quantize} needs {lacks}")
