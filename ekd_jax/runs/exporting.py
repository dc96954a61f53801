"""Export of students and ensembles: what of a run is exported, and the images that files are compared on."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from ml_collections import ConfigDict, FrozenConfigDict

from ekd_jax.config.resolve import identity, resolve
from ekd_jax.data.decode import Reader
from ekd_jax.data.opening import open_data
from ekd_jax.runs.evaluation import config_of
from ekd_jax.runs.run import Run, make_predict
from ekd_jax.students.formats.export import ExportRecord, export
from ekd_jax.students.formats.exportable import Exportable, exportable_student
from ekd_jax.students.student import LoadedStudent

IMAGES = 50  # on which files are compared with JAX: one, and seven times seven


def export_student(
    student: LoadedStudent,
    output: str | os.PathLike[str],
    formats: Sequence[str] = ("onnx",),
    images: np.ndarray | None = None,
    with_preprocessing: bool = False,
    dtype: str = "float32",
    onnxruntime_web: str | os.PathLike[str] | None = None,
) -> ExportRecord:
    """Write a student for other runtimes to a new directory, each file compared with JAX before.

    Args:
        student: as `load_student` or `load_run(...).student(n)` returns it.
        output: new directory.
        formats: "onnx", "stablehlo", "openvino", "html".
        images: (N, H, W, C) uint8 to compare on; test images of the student's data set if not given.
        with_preprocessing: the files take images as uint8 and give probabilities; without, they take normalized
            images and give logits.
        dtype: "float32", or "float16" except for StableHLO.
        onnxruntime_web: directory of that npm package, for "html"; `node_modules/onnxruntime-web` if not given.

    Returns:
        The record that is also in `export.json`.

    Raises:
        UserError: an unknown format, a package is missing, a runtime computes something else, or the data is missing.
    """
    where = "images that were passed in Python"
    if images is None:
        config = config_of(student)
        images, where = some_test_images(config, student.input_shape), f"test images of {config.data.name}"
    network = exportable_student(student, with_preprocessing)
    return export(
        network, formats, pathlib.Path(output), images, where, dtype, onnxruntime_web=onnxruntime_web
    )


def exportable_ensemble(run: Run, with_preprocessing: bool = False) -> Exportable:
    """Return the ensemble of a run's students as it is exported. It computes in float32, however it was trained."""
    changed = ConfigDict(run.config)
    changed.train.dtype = "float32"
    run = dataclasses.replace(run, config=resolve(changed))
    predict, variables = make_predict(run.networks), run.checkpoint.variables
    place = run.names.index("ensemble")

    def logits(images: jax.Array) -> jax.Array:
        return lax.index_in_dim(predict(variables, images), place, keepdims=False)

    return Exportable(
        name="the ensemble",
        logits=logits,
        input_shape=run.description.input_shape,
        class_names=tuple(run.description.class_names),
        preprocessing=run.preprocessing,
        about={"provenance": {**identity(run.config), "step": run.checkpoint.step}},
        with_preprocessing=with_preprocessing,
    )


def some_test_images(config: FrozenConfigDict, input_shape: tuple[int, int, int]) -> np.ndarray:
    """Return images of a test set, (N, H, W, C) uint8, spread over the whole set.

    Args:
        config: its section `data` names the set.
        input_shape: H, W, C of the network's input.

    Raises:
        UserError: the data is missing, or an image cannot be read.
    """
    test = open_data(config).test
    read = Reader(input_shape, config.data.fit, config.data.max_pixels)
    places = np.linspace(0, len(test) - 1, min(IMAGES, len(test))).astype(int)
    return np.stack([read(test[int(place)]) for place in places])
