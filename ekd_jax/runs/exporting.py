"""Export of students and ensembles: what of a run is exported, and the images that files are compared on."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from ml_collections import ConfigDict, FrozenConfigDict

from ekd_jax.config.resolve import identity, resolve
from ekd_jax.data.dataset import Examples, Subset
from ekd_jax.data.decode import decode, resized
from ekd_jax.data.opening import Data, open_data, read_example
from ekd_jax.runs.evaluation import config_of
from ekd_jax.runs.run import Run, make_predict
from ekd_jax.students.formats.export import export
from ekd_jax.students.formats.exportable import Exportable, exportable_student
from ekd_jax.students.formats.record import ExportRecord
from ekd_jax.students.formats.registry import check_formats
from ekd_jax.students.formats.request import Labeled, Options, QuantizationImages, Request
from ekd_jax.students.student import LoadedStudent

IMAGES = 50  # on which files are compared with JAX: one, and seven times seven
# At most so many images calibrate int8, choose a recipe, and measure what it costs.
CALIBRATION, VALIDATION, TEST = 256, 1000, 5000
SPLITTING = ("train_examples", "validation_examples")  # knobs in the section data that say who trains


def export_student(
    student: LoadedStudent,
    output: str | os.PathLike[str],
    formats: Sequence[str] = ("onnx",),
    images: np.ndarray | None = None,
    with_preprocessing: bool = False,
    **options: Any,
) -> ExportRecord:
    """Write a student for other runtimes to a new directory, each file compared with JAX before.

    Args:
        student: as `load_student` or `load_run(...).student(n)` returns it.
        output: new directory.
        formats: "onnx", "stablehlo", "openvino", "torch", "html".
        images: (N, H, W, C) uint8 to compare on; test images of the student's data set if not given.
        with_preprocessing: the files take images as uint8 and give probabilities; without, they take normalized
            images and give logits.
        **options: fields of `Options`: `dtype`, `quantize` and `max_loss`, `with_resizing`; of "torch" `library` and
            `torch_network`; of "html" `onnxruntime_web`.

    Returns:
        The record that is also in `export.json`.

    Raises:
        UserError: an unknown format, a package is missing, a runtime computes something else, int8 costs too
            much, or the data is missing.
    """
    where = "images that were passed in Python"
    if images is None:
        config = config_of(student)
        images, where = some_test_images(config, student.input_shape), f"test images of {config.data.name}"
    chosen = Options(**options)
    network = exportable_student(student, with_preprocessing or chosen.with_resizing)
    check_formats(formats, chosen, with_preprocessing=with_preprocessing)
    of_int8 = None
    if chosen.quantize:
        of_int8 = quantization_images(trained_with(student), student.input_shape, student.class_names)
    others = (
        [of_another_size(image, student.input_shape) for image in images] if chosen.with_resizing else []
    )
    asked = Request((network,), images, chosen, of_int8, others)
    return export(asked, formats, pathlib.Path(output), where)


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
    data = open_data(config).with_input(input_shape)
    return _spread(data, data.test, IMAGES, "").images


def originals(config: FrozenConfigDict, input_shape: tuple[int, int, int]) -> list[np.ndarray]:
    """Return test images as they are stored, (H', W', C) uint8, for a file that resizes them.

    Those that have the network's size are enlarged, since nothing would be resized. For arguments and errors see
    `some_test_images`.
    """
    test = open_data(config).test
    return [
        of_another_size(
            decode(example.image, input_shape[2], max_pixels=config.data.max_pixels), input_shape
        )
        for example in (test[int(place)] for place in _places(test, IMAGES))
    ]


def of_another_size(pixels: np.ndarray, input_shape: tuple[int, int, int]) -> np.ndarray:
    """Return an image (H', W', C) uint8 as it is, or a larger one of other proportions if it has this shape."""
    height, width, _ = input_shape
    return resized(pixels, 2 * height, 3 * width) if pixels.shape == input_shape else pixels


def quantization_images(
    config: FrozenConfigDict, input_shape: tuple[int, int, int], class_names: Sequence[str]
) -> QuantizationImages:
    """Return the images that int8 is calibrated on, chosen by and measured with.

    The network is chosen by the images that its run held out for validation, or, if it held none out, by training
    images that do not calibrate.

    Args:
        config: its section `data` names the set, `seed` and `data.validation_examples` what was held out.
        input_shape: H, W, C of the network's input.
        class_names: of the network; labels count in them.

    Raises:
        UserError: the data is missing, or an image cannot be read.
    """
    data = open_data(config).with_input(input_shape).with_classes(class_names, "the student")
    name, train = data.facts.name, np.arange(len(data.train))
    if data.validation is None:
        train, rest = train[::2], Subset(data.train, train[1::2])
        chosen = _spread(data, rest, VALIDATION, f"training images of {name} that do not calibrate")
    else:
        chosen = _spread(data, data.validation, VALIDATION, f"validation images of {name}")
    return QuantizationImages(
        calibration=_spread(data, Subset(data.train, train), CALIBRATION, f"training images of {name}"),
        validation=chosen,
        test=_spread(data, data.test, TEST, f"test images of {name}"),
    )


def _spread(data: Data, examples: Examples, number: int, name: str) -> Labeled:
    """Return at most that many examples, spread over the whole of them."""
    places = _places(examples, number)
    pairs = [read_example(examples, data.reader, data.facts, int(place)) for place in places]
    return Labeled(np.stack([pixels for pixels, _ in pairs]), np.array([label for _, label in pairs]), name)


def _places(examples: Examples, number: int) -> np.ndarray:
    return np.linspace(0, len(examples) - 1, min(number, len(examples))).astype(int)


def trained_with(student: LoadedStudent) -> FrozenConfigDict:
    """Return a configuration with the data that a student was trained with, what was held out included."""
    own = student.description.provenance
    changed = ConfigDict(config_of(student))
    changed.seed = own.seed
    for knob in SPLITTING:
        if (name := f"data.{knob}") in own.settings:
            changed.data[knob] = own.settings[name]
    return resolve(changed)
