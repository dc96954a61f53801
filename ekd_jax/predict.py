"""Asks a student that was taken out what is on an image.

python -m ekd_jax.predict --student_dir=DIR --image=FILE
"""

import pathlib

import numpy as np
from absl import flags
from PIL import Image, UnidentifiedImageError

from ekd_jax import commands
from ekd_jax.errors import UserError, reason
from ekd_jax.extract import load_student

FLAGS = flags.FLAGS


def read_image(path: pathlib.Path, shape: tuple[int, int, int]) -> np.ndarray:
    """The image as (1, H, W, C) uint8 of `shape`, grey or colour and resized as needed.

    Raises:
        UserError: no such file, or not an image.
    """
    height, width, channels = shape
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"cannot read an image from --image={path}: {reason(error)}") from error
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(1, height, width, channels)


def main() -> None:
    """The command."""
    student = load_student(FLAGS.student_dir)
    image = read_image(pathlib.Path(FLAGS.image), student.input_shape)
    probabilities = np.asarray(student.predict(image))[0]
    for k in np.argsort(-probabilities)[:3]:
        print(f"{student.class_names[k]:<12} {100 * probabilities[k]:5.1f} %")


if __name__ == "__main__":
    flags.DEFINE_string("student_dir", None, "folder that ekd_jax.extract wrote", required=True)
    flags.DEFINE_string("image", None, "an image file", required=True)
    commands.run(main)
