"""Asks a student that was taken out what is on an image.

python -m ekd_jax.predict --student_dir=DIR --image=FILE
"""

import pathlib

import numpy as np
from absl import flags

from ekd_jax import cli
from ekd_jax.students.student import load_student, read_image

FLAGS = flags.FLAGS


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
    cli.run(main)
