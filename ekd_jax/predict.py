"""Ask an extracted student what is in an image, or in many.

    python -m ekd_jax.predict --student_dir=DIR --image=FILE
    python -m ekd_jax.predict --student_dir=DIR --image=DIRECTORY --image=FILE --top=5 --output=predictions.csv

A directory stands for all images in it, at any depth. Images that cannot be read are named and counted, and the
exit code is 1 then.
"""

import json
import sys
from collections.abc import Sequence

from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.common.files import write_bytes
from ekd_jax.common.log import logger
from ekd_jax.common.text import csv_text, printable
from ekd_jax.data.decode import MAX_PIXELS
from ekd_jax.data.folder import image_files
from ekd_jax.students.predictions import Prediction, predict_files
from ekd_jax.students.student import load_student

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the command's own flags."""
    flags.DEFINE_string("student_dir", None, "directory of a student, as extract writes it", required=True)
    flags.DEFINE_multi_string(
        "image", None, "an image file or a directory of images; may be repeated", required=True
    )
    flags.DEFINE_integer("top", 3, "number of classes per image, the likeliest first", lower_bound=1)
    flags.DEFINE_integer(
        "max_pixels", MAX_PIXELS, "largest image that is decoded; a small file may claim any size", 1
    )
    flags.DEFINE_string("output", None, "file to write, .csv or .json, instead of printing")


def main() -> int:
    """Run the command."""
    output = cli.output_file("output", (".csv", ".json"))
    student = load_student(FLAGS.student_dir)
    files = image_files(FLAGS.image)
    top = min(FLAGS.top, len(student.class_names))
    found = list(predict_files(student, files, top, FLAGS.max_pixels))
    read = [prediction for prediction in found if not prediction.problem]
    if len(files) == 1 and not read:
        raise UserError(found[0].problem)
    if output:
        text = _as_file(output.suffix.lower(), read, top)
        try:
            write_bytes(output, text.encode(errors="surrogateescape"))
        except OSError as error:
            print(text, end="")  # what took long is not lost
            raise UserError(
                f"cannot write --output={output}: {error.strerror}; the predictions were printed instead"
            ) from error
        print(f"{len(read):,} images -> {output}")
    else:
        print(_as_text(read, one=len(files) == 1))
    for prediction in found:
        if prediction.problem:
            logger.warning(prediction.problem)
    if len(read) < len(found):
        logger.warning(
            f"left out {len(found) - len(read):,} of {len(found):,} images, which cannot be read"
        )
        return 1
    return 0


def _as_text(found: Sequence[Prediction], one: bool) -> str:
    """Return a line per class for one image, and a line per image for several."""
    rows = [
        [f"{name:<12} {100 * p:5.1f} %" for name, p in zip(each.classes, each.probabilities, strict=True)]
        for each in found
    ]
    if one:
        return "\n".join(rows[0])
    return "\n".join(
        f"{printable(each.file)}  {'  '.join(row)}" for each, row in zip(found, rows, strict=True)
    )


def _as_file(suffix: str, found: Sequence[Prediction], top: int) -> str:
    """Return the predictions as CSV (image, class_1, probability_1, class_2, ...) or JSON, by the suffix."""
    if suffix == ".json":
        each = [
            {
                "image": p.file,
                "classes": [
                    {"class": name, "probability": value}
                    for name, value in zip(p.classes, p.probabilities, strict=True)
                ],
            }
            for p in found
        ]
        return json.dumps(each, indent=2) + "\n"
    header = ["image", *(f"{what}_{k}" for k in range(1, top + 1) for what in ("class", "probability"))]
    rows = [
        [p.file, *(cell for pair in zip(p.classes, p.probabilities, strict=True) for cell in pair)]
        for p in found
    ]
    return csv_text([header, *rows])


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
