"""Export a student, or the ensemble of a run, for other runtimes.

    python -m ekd_jax.export --student_dir=DIR --format=onnx --output=DIR
    python -m ekd_jax.export --workdir=RUN --student=3 --format=onnx,openvino --with_preprocessing --output=DIR
    python -m ekd_jax.export --workdir=RUN --student=ensemble --format=stablehlo --output=DIR
    python -m ekd_jax.export --workdir=RUN --student=all --format=html --output=DIR

`html` is one page that runs students side by side in a browser, without a server or a network. It needs a package of
npm, which becomes part of the page: npm install onnxruntime-web.

Every file is run by its own runtime and compared with JAX before anything is written. `export.json` beside the files
says what they take and give, and how they compared.
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.data.folder import image_files
from ekd_jax.runs.evaluation import config_of, with_data
from ekd_jax.runs.exporting import IMAGES, exportable_ensemble, some_test_images
from ekd_jax.runs.run import Run, load_run
from ekd_jax.students.formats.export import DTYPES, FORMATS, check_formats, export
from ekd_jax.students.formats.exportable import Exportable, exportable_student
from ekd_jax.students.student import LoadedStudent, check_output, load_student, read_image

FLAGS = flags.FLAGS
ENSEMBLE, ALL = "ensemble", "all"


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
    flags.DEFINE_string(
        "onnxruntime_web",
        None,
        "for html: directory of the npm package onnxruntime-web; node_modules/onnxruntime-web if not given",
    )
    flags.DEFINE_multi_string(
        "verify_with",
        None,
        "image file or directory to compare on; test images if not given; may be repeated",
    )
    flags.DEFINE_string("data_dir", None, "directory of prepared data sets, for the test images")
    flags.DEFINE_string("manual_dir", None, "directory of archives or class folders, for the test images")


def main() -> None:
    """Run the command."""
    output = pathlib.Path(FLAGS.output)
    several = FLAGS.student is not None and (len(FLAGS.student) > 1 or FLAGS.student == [ALL])
    if FLAGS.onnxruntime_web is not None and "html" not in FLAGS.format:
        raise UserError("--onnxruntime_web is for --format=html: leave it out")
    check_formats(FLAGS.format, FLAGS.dtype, several, FLAGS.with_preprocessing, FLAGS.onnxruntime_web)
    check_output(output)
    (network, *beside), student = _networks()
    images, where = _images(student)
    record = export(
        network, FLAGS.format, output, images, where, FLAGS.dtype, beside, FLAGS.onnxruntime_web
    )
    for each in record.exported:
        print(
            f"{each.network} as {each.format} -> {', '.join(str(output / file) for file in each.files)}: "
            f"{each.bytes / 1e3:,.0f} kB, {each.same_class} of {each.images} images in the same class by "
            f"{each.runtime}, largest difference {each.difference:.1e} of the deviation"
        )


def _networks() -> tuple[Sequence[Exportable], LoadedStudent]:
    """Return what is exported, and a student that takes the same images."""
    if (FLAGS.student_dir is None) == (FLAGS.workdir is None):
        raise UserError("pass --student_dir=DIR, or --workdir=RUN with --student=N or --student=ensemble")
    if FLAGS.student_dir is not None:
        for flag in ("student", "step", "best"):
            if FLAGS[flag].present:
                raise UserError(f"--{flag} belongs to --workdir, not to --student_dir")
        student = load_student(FLAGS.student_dir)
        return [exportable_student(student, FLAGS.with_preprocessing)], student
    cli.check_checkpoint_flags()
    run = load_run(FLAGS.workdir, FLAGS.step, FLAGS.best)
    asked = FLAGS.student or [""]
    if asked == [ALL]:
        asked = [str(student.student) for student in run.description.students]
    if twice := [name for place, name in enumerate(asked) if name in asked[:place]]:
        raise UserError(f"--student={','.join(asked)} names {twice[0]} twice")
    networks = [_of_run(run, name) for name in asked]
    return networks, run.student(next((int(name) for name in asked if name != ENSEMBLE), 1))


def _of_run(run: Run, name: str) -> Exportable:
    """Return a student of a run by its number, or the ensemble."""
    if name == ENSEMBLE:
        return exportable_ensemble(run, FLAGS.with_preprocessing)
    if not name.isdecimal():
        raise UserError(f"--student={name} must be the number of a student, from 1, or {ENSEMBLE}")
    return exportable_student(run.student(int(name)), FLAGS.with_preprocessing)


def _images(student: LoadedStudent) -> tuple[np.ndarray, str]:
    """Return the images to compare on, (N, H, W, C) uint8, and where they are from."""
    if FLAGS.verify_with:
        files = image_files(FLAGS.verify_with)
        chosen = files[:: max(1, len(files) // IMAGES)][:IMAGES]
        return np.concatenate([read_image(file, student) for file in chosen]), ", ".join(FLAGS.verify_with)
    config = with_data(
        config_of(student),
        {"data_dir": FLAGS.data_dir, "manual_dir": FLAGS.manual_dir},
        student.input_shape,
    )
    if not config.data.name:
        raise UserError(
            "it is not known on which images this student was tested: pass --verify_with=DIRECTORY"
        )
    try:
        return some_test_images(config, student.input_shape), f"test images of {config.data.name}"
    except UserError as error:
        raise UserError(f"{error}; or compare on images of yours with --verify_with=DIRECTORY") from error


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
