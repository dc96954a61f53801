"""Asks a student that was taken out what is on an image.

python -m ekd_jax.predict --student_dir=DIR --image=FILE
"""

import pathlib

import numpy as np
from absl import flags

from ekd_jax import commands
from ekd_jax.data.dataset import Example
from ekd_jax.data.images import CorruptImageError, Reader
from ekd_jax.errors import UserError, reason
from ekd_jax.extract import LoadedStudent, load_student

FLAGS = flags.FLAGS


def read_image(path: pathlib.Path, student: LoadedStudent) -> np.ndarray:
    """The image as (1, H, W, C) uint8, brought to its size as images to test on were.

    Raises:
        UserError: no such file, or not an image.
    """
    read = Reader(student.input_shape, "crop" if student.fit == "crop" else "stretch")
    try:
        return read(Example(path.read_bytes(), 0, str(path)))[None]
    except (OSError, CorruptImageError) as error:
        why = reason(error.__cause__ or error)
        raise UserError(f"cannot read an image from --image={path}: {why}") from error


def main() -> None:
    """The command."""
    student = load_student(FLAGS.student_dir)
    image = read_image(pathlib.Path(FLAGS.image), student)
    probabilities = np.asarray(student.predict(image))[0]
    for k in np.argsort(-probabilities)[:3]:
        print(f"{student.class_names[k]:<12} {100 * probabilities[k]:5.1f} %")


if __name__ == "__main__":
    flags.DEFINE_string("student_dir", None, "folder that ekd_jax.extract wrote", required=True)
    flags.DEFINE_string("image", None, "an image file", required=True)
    commands.run(main)
