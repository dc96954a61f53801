"""Export: networks as files for other runtimes, each of which is compared with JAX before it is written."""

import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import replacing, write_bytes
from ekd_jax.common.records import write_record
from ekd_jax.data.dataset import Example
from ekd_jax.data.decode import Fit, Reader
from ekd_jax.students.formats import int8, onnx_file, onnx_resizing
from ekd_jax.students.formats.exportable import Exportable
from ekd_jax.students.formats.record import (
    RESIZED,
    TOLERANCE,
    Comparison,
    Exported,
    ExportRecord,
    Quantization,
    Resizing,
    Tried,
)
from ekd_jax.students.formats.registry import FORMATS, ONNX, Files, Format, check_formats
from ekd_jax.students.formats.request import Request, in_batches
from ekd_jax.students.formats.timing import THREADS, Subject, conditions, measure
from ekd_jax.students.student import check_output

RECORD = "export.json"


def export(asked: Request, formats: Sequence[str], output: pathlib.Path, compared_on: str) -> ExportRecord:
    """Write a network in several formats to a new directory, all of them or none, with a record beside them.

    Every format is run by its own runtime first and compared with JAX: the same classes, and no difference above
    `TOLERANCE`.

    Args:
        asked: what is exported.
        formats: keys of `FORMATS`.
        output: new directory.
        compared_on: where the images are from, for the record.

    Raises:
        UserError: an unknown format, a package is missing, a format cannot hold the network, a runtime differs, int8
            costs too much, or `output` exists.
    """
    check_formats(formats, asked.options, len(asked.networks) > 1, asked.network.with_preprocessing)
    check_output(output)
    for name in formats:
        FORMATS[name].check(asked)
    _check_images(asked)
    batches = in_batches(asked.images)  # of one size, so that JAX compiles each network once
    expected_SxNxK = [
        np.concatenate([each.expected(batch) for batch in batches]) for each in asked.networks
    ]
    in_int8 = _InInt8(asked) if asked.options.quantize else None
    files: Files = {}
    exported: list[Exported] = []
    for name in dict.fromkeys(formats):
        own, found_SxNxK = _written_and_run(name, asked)
        written = [
            _compared(name, network, asked, Comparison(found, expected))
            for network, found, expected in zip(asked.networks, found_SxNxK, expected_SxNxK, strict=True)
        ]
        if in_int8:
            own, written[0] = in_int8.in_place_of(name, own, written[0], expected_SxNxK[0])
        if asked.options.with_resizing:
            own, resizing = _with_resizing(asked, own)
            written[0] = dataclasses.replace(written[0], resizing=resizing)
        exported += [each.with_files(own) for each in written]
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


def _check_images(asked: Request) -> None:
    images, shape = asked.images, asked.network.input_shape
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape or not len(images):
        wanted, given = ("x".join(map(str, sizes)) for sizes in (("N", *shape), images.shape))
        raise UserError(f"to compare, pass uint8 images {wanted}, at least one, not {images.dtype} {given}")


def _facts(networks: Sequence[Exportable]) -> dict[str, Any]:
    """Return what a file says about itself; of several networks, what differs by their names."""
    first, *others = each = [network.metadata() for network in networks]
    if not others:
        return first
    shared = {key: value for key, value in first.items() if all(o.get(key) == value for o in others)}
    own = [{key: value for key, value in one.items() if key not in shared} for one in each]
    return {**shared, "networks": {n.name: facts for n, facts in zip(networks, own, strict=True)}}


def _written_and_run(name: str, asked: Request) -> tuple[Files, np.ndarray]:
    """Return the files of a format, and what its runtime gives for each network and all images, (S, N, K)."""
    form = FORMATS[name]
    try:
        files = form.write(asked)
        found = np.concatenate(form.run(files, asked.batches if form.several else asked.inputs), axis=-2)
        return files, found.reshape(len(asked.networks), *found.shape[-2:])
    except onnx_file.UnwritableError as error:
        raise UserError(f"{error}; --format=stablehlo takes every network") from error
    except UserError:
        raise
    except Exception as error:  # runtimes raise kinds of their own
        raise UserError(
            f"{asked.network.name} as {name} does not run in {form.runtime} ({reason(error)}); "
            f"nothing was written"
        ) from error


def _compared(name: str, network: Exportable, asked: Request, outputs: Comparison) -> Exported:
    """Return the record of a network in a format; raise UserError where its runtime and JAX differ."""
    runtime, version, dtype = FORMATS[name].runtime, FORMATS[name].version, asked.options.dtype
    if problem := outputs.problem(TOLERANCE[dtype]):
        raise UserError(f"{runtime} computes something else from the {name} file: {problem}")
    return Exported(
        format=name,
        network=network.name,
        dtype=dtype,
        layout=FORMATS[name].layout,
        runtime=version(asked) if version else f"{runtime} {importlib.metadata.version(runtime)}",
        images=len(outputs.found),
        difference=outputs.difference,
        same_class=outputs.same_class,
    )


class _InInt8:
    """Puts files in int8 in place of those in float32, if that does not cost too much."""

    def __init__(self, asked: Request):
        assert asked.quantization is not None
        self._asked, self._images = asked, asked.quantization
        self._content = b""  # the ONNX file, which all formats are made of
        self._tried: tuple[Tried, ...] = ()

    def in_place_of(
        self, name: str, files: Files, written: Exported, expected: np.ndarray
    ) -> tuple[Files, Exported]:
        """Return the files of a format in int8, and their record.

        Args:
            name: of the format.
            files: in float32.
            written: the record of these.
            expected: what JAX gives for the images that files are compared on, (N, K).

        Raises:
            UserError: it costs too much.
        """
        asked, form = self._asked, FORMATS[name]
        assert form.of_onnx is not None
        if not self._content:
            content = onnx_file.write_onnx(asked.network)
            self._content, self._tried = int8.best_quantized(content, asked.network, self._images)
        own = form.of_onnx(self._content)
        cost = Quantization(
            tried=self._tried,
            calibrated_on=str(self._images.calibration),
            chosen_on=str(self._images.validation),
            measured_on=str(self._images.test),
            images=len(self._images.test.images),
            correct=self._correct(form, own),
            correct_in_float32=self._correct(form, files),
            bytes_in_float32=sum(map(len, files.values())),
        )
        if cost.loss > asked.options.max_loss:
            before, after = (100 * n / cost.images for n in (cost.correct_in_float32, cost.correct))
            raise UserError(
                f"{asked.options.quantize} as {name} costs {cost.loss:.2f} points of top-1, {before:.2f} -> "
                f"{after:.2f} % of {cost.measured_on}, with the best of {len(cost.tried)} recipes "
                f"({cost.tried[0].recipe}), and --max_loss={asked.options.max_loss:g}: nothing was written; leave out "
                f"--quantize, or allow more"
            )
        before, after = self._latencies(form)
        cost = dataclasses.replace(cost, latency_ms=after, latency_ms_in_float32=before)
        outputs = Comparison(np.concatenate(form.run(own, asked.inputs)), expected)
        return own, dataclasses.replace(
            written,
            dtype=asked.options.quantize,
            difference=outputs.difference,
            same_class=outputs.same_class,
            quantization=cost,
        )

    def _latencies(self, form: Format) -> tuple[float, float]:
        """Return the median time of a call with one image in float32 and in int8, in milliseconds."""
        network = self._asked.network
        subjects = [Subject("float32", network), Subject("int8", network, onnx_file=self._content)]
        before, after = measure(subjects, [conditions(form.runtime, THREADS)], [1])
        return before.median_ms, after.median_ms

    def _correct(self, form: Format, files: Files) -> int:
        """Return how many test images the format's runtime classifies rightly."""
        test = self._images.test
        found = form.run(files, [self._asked.network.inputs(batch) for batch in in_batches(test.images)])
        return int((np.concatenate(found).argmax(1) == test.labels).sum())


def _with_resizing(asked: Request, files: Files) -> tuple[Files, Resizing]:
    """Return an ONNX file that resizes, compared with one whose images Pillow has resized."""
    network, run = asked.network, FORMATS["onnx"].run
    if not network.with_preprocessing:
        raise UserError("--with_resizing needs --with_preprocessing: what is resized are pixels")
    fit: Fit = "crop" if network.preprocessing.fit == "crop" else "stretch"
    read = Reader(network.input_shape, fit)
    resizing = {ONNX: onnx_resizing.with_resizing(files[ONNX], network.input_shape, fit)}
    resized = [read(Example(image, 0, f"number {i}")) for i, image in enumerate(asked.originals)]
    outputs = Comparison(
        np.concatenate(run(resizing, [image[None] for image in asked.originals])),
        np.concatenate(run(files, [image[None] for image in resized])),
    )
    if problem := outputs.problem(RESIZED):
        raise UserError(f"--with_resizing: onnxruntime resizes otherwise than Pillow: {problem}")
    return resizing, Resizing(fit, len(resized), outputs.difference, outputs.same_class)
