"""Export a student, or the ensemble of a run, for other runtimes.

    python -m ekd_jax.export --student_dir=DIR --format=onnx --output=DIR
    python -m ekd_jax.export --workdir=RUN --student=3 --format=onnx,openvino --with_preprocessing --output=DIR
    python -m ekd_jax.export --workdir=RUN --student=ensemble --format=stablehlo --output=DIR
    python -m ekd_jax.export --student_dir=DIR --format=torch --library=torchvision --output=DIR
    python -m ekd_jax.export --workdir=RUN --student=all --format=html --output=DIR

`html` is one page that runs students side by side in a browser, without a server or a network. It needs a package of
npm, which becomes part of the page: npm install onnxruntime-web.

Every file is run by its own runtime and compared with JAX before anything is written. `export.json` beside the files
says what they take and give, and how they compared.
"""

import pathlib
import sys

import numpy as np
from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.common.text import table, three_digits
from ekd_jax.data.decode import decode, read_image_file
from ekd_jax.data.folder import image_files
from ekd_jax.runs.evaluation import config_of, with_data
from ekd_jax.runs.exporting import (
    IMAGES,
    exportable_ensemble,
    of_another_size,
    originals,
    quantization_images,
    some_test_images,
    trained_with,
)
from ekd_jax.runs.run import Run, load_run
from ekd_jax.students.formats.export import export
from ekd_jax.students.formats.exportable import Exportable, exportable_student
from ekd_jax.students.formats.record import Quantization
from ekd_jax.students.formats.registry import FORMATS, check_formats
from ekd_jax.students.formats.request import DTYPES, Options, QuantizationImages, Request
from ekd_jax.students.student import LoadedStudent, check_output, load_student, read_image

FLAGS = flags.FLAGS
ENSEMBLE, ALL = "ensemble", "all"
Places = dict[str, str | None]  # knobs that say where data is


def define_flags() -> None:
    """Define the command's own flags."""
    flags.DEFINE_string("student_dir", None, "directory of a student, as extract writes it")
    flags.DEFINE_string("workdir", None, "directory of a run, instead of a student")
    flags.DEFINE_list(
        "student",
        None,
        "of the run: number of the student, from 1, or `ensemble`; for html also several, as in 1,3,5, or `all`",
    )
    flags.DEFINE_integer("step", None, "of the run: step of the checkpoint; the latest if not given")
    flags.DEFINE_boolean("best", False, "of the run: the kept checkpoint in which the student did best")
    flags.DEFINE_list(
        "format", None, f"kinds of files, separated by commas: {', '.join(FORMATS)}", required=True
    )
    flags.DEFINE_string("output", None, "new directory to write", required=True)
    flags.DEFINE_string("dtype", DTYPES[0], f"what the files compute in: {' or '.join(DTYPES)}")
    flags.DEFINE_boolean(
        "with_preprocessing",
        False,
        "the files take images as uint8 and give probabilities; without, they take normalized images and give logits",
    )
    flags.DEFINE_boolean(
        "with_resizing", False, "--with_preprocessing, and images may have any size; for --format=onnx"
    )
    flags.DEFINE_string(
        "library",
        "",
        "of torch: whose names the arrays get, such as torchvision, timm, RepDistiller or official",
    )
    flags.DEFINE_string(
        "torch_network",
        "",
        "of torch: MODULE:FUNCTION(ARGUMENTS) that makes the network in your copy of a library that is no package",
    )
    flags.DEFINE_string(
        "onnxruntime_web",
        None,
        "of html: directory of the npm package onnxruntime-web; node_modules/onnxruntime-web if not given",
    )
    flags.DEFINE_string("quantize", "", "int8: compute in 8-bit integers, calibrated on training images")
    flags.DEFINE_float("max_loss", 1.0, "with --quantize: how many points of top-1 that may cost")
    flags.DEFINE_multi_string(
        "verify_with",
        None,
        "image file or directory to compare on; test images if not given; may be repeated",
    )
    flags.DEFINE_string(
        "data_dir", None, "directory of prepared data sets, if they are not where the run had them"
    )
    flags.DEFINE_string("manual_dir", None, "directory of archives, if they are not where the run had them")


def main() -> None:
    """Run the command."""
    output = pathlib.Path(FLAGS.output)
    options = Options(
        FLAGS.dtype,
        FLAGS.library,
        FLAGS.torch_network,
        FLAGS.quantize,
        FLAGS.max_loss,
        FLAGS.with_resizing,
        FLAGS.onnxruntime_web,
    )
    if FLAGS["max_loss"].present and not FLAGS.quantize:
        raise UserError("--max_loss belongs to --quantize")
    several = FLAGS.student is not None and (len(FLAGS.student) > 1 or FLAGS.student == [ALL])
    check_formats(FLAGS.format, options, several, FLAGS.with_preprocessing)
    check_output(output)
    networks, student, places = _networks()
    images, before_resizing, where = _images(student, places)
    of_int8 = _quantization_images(student, places) if FLAGS.quantize else None
    asked = Request(networks, images, options, of_int8, before_resizing)
    record = export(asked, FLAGS.format, output, where)
    for each in record.exported:
        print(
            f"{each.network} as {each.format} -> {', '.join(str(output / file) for file in each.files)}: "
            f"{each.bytes / 1e3:,.0f} kB, {each.same_class} of {each.images} images in the same class by "
            f"{each.runtime}, largest difference {each.difference:.1e} of the deviation"
        )
        if each.resizing:
            print(
                f"resized inside ({each.resizing.fit}): {each.resizing.same_class} of {each.resizing.images} images in "
                f"the same class, largest difference {each.resizing.difference:.1e} of the deviation"
            )
        if each.quantization:
            print(_as_text(each.quantization, each.bytes))


def _networks() -> tuple[tuple[Exportable, ...], LoadedStudent, Places]:
    """Return what is exported, a student that takes the same images, and where its data is."""
    places = {"data_dir": FLAGS.data_dir, "manual_dir": FLAGS.manual_dir}
    if (FLAGS.student_dir is None) == (FLAGS.workdir is None):
        raise UserError("pass --student_dir=DIR, or --workdir=RUN with --student=N or --student=ensemble")
    if FLAGS.student_dir is not None:
        for flag in ("student", "step", "best"):
            if FLAGS[flag].present:
                raise UserError(f"--{flag} belongs to --workdir, not to --student_dir")
        student = load_student(FLAGS.student_dir)
        return (exportable_student(student, _inside()),), student, places
    cli.check_checkpoint_flags()
    run = load_run(FLAGS.workdir, FLAGS.step, FLAGS.best)
    asked = FLAGS.student or [""]
    if asked == [ALL]:
        asked = [str(student.student) for student in run.description.students]
    if twice := [name for place, name in enumerate(asked) if name in asked[:place]]:
        raise UserError(f"--student={','.join(asked)} names {twice[0]} twice")
    networks = tuple(_of_run(run, name) for name in asked)
    places = {name: given or run.config.data[name] for name, given in places.items()}
    return networks, run.student(next((int(name) for name in asked if name != ENSEMBLE), 1)), places


def _of_run(run: Run, name: str) -> Exportable:
    """Return a student of a run by its number, or the ensemble."""
    if name == ENSEMBLE:
        return exportable_ensemble(run, _inside())
    if not name.isdecimal():
        raise UserError(f"--student={name} must be the number of a student, from 1, or {ENSEMBLE}")
    return exportable_student(run.student(int(name)), _inside())


def _inside() -> bool:
    """Return whether the files prepare images themselves."""
    return bool(FLAGS.with_preprocessing or FLAGS.with_resizing)


def _images(student: LoadedStudent, places: Places) -> tuple[np.ndarray, list[np.ndarray], str]:
    """Return the images to compare on, (N, H, W, C) uint8, the same before resizing, and where they are from."""
    shape = student.input_shape
    if FLAGS.verify_with:
        files = image_files(FLAGS.verify_with)
        chosen = files[:: max(1, len(files) // IMAGES)][:IMAGES]
        images = np.concatenate([read_image(file, student) for file in chosen])
        before = [decode(read_image_file(file), shape[2]) for file in chosen] if FLAGS.with_resizing else []
        return images, [of_another_size(image, shape) for image in before], ", ".join(FLAGS.verify_with)
    config = with_data(config_of(student), places, shape)
    if not config.data.name:
        raise UserError(
            "it is not known on which images this student was tested: pass --verify_with=DIRECTORY"
        )
    try:
        before = originals(config, shape) if FLAGS.with_resizing else []
        return some_test_images(config, shape), before, f"test images of {config.data.name}"
    except UserError as error:
        raise UserError(f"{error}; or compare on images of yours with --verify_with=DIRECTORY") from error


def _quantization_images(student: LoadedStudent, places: Places) -> QuantizationImages:
    """Return the images that int8 is made and measured with."""
    config = with_data(trained_with(student), places, student.input_shape)
    return quantization_images(config, student.input_shape, student.class_names)


def _as_text(own: Quantization, size: int) -> str:
    """Return what int8 costs as a table."""
    rows = [
        [name, f"{100 * correct / own.images:.2f}", three_digits(milliseconds), f"{bytes_ / 1e3:,.0f}"]
        for name, correct, milliseconds, bytes_ in (
            ("float32", own.correct_in_float32, own.latency_ms_in_float32, own.bytes_in_float32),
            ("int8", own.correct, own.latency_ms, size),
        )
    ]
    lines = [table(rows, ["", "top-1 %", "ms", "kB"]), f"top-1 on {own.measured_on}"]
    lines.append("ms: median of a call with one image, on one thread; both took turns")
    lines.append(f"recipe: {own.tried[0].recipe}; the best of {len(own.tried)} on {own.chosen_on}")
    return "\n".join([*lines, f"calibrated on {own.calibrated_on}"])


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
