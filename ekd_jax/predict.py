"""Ask an extracted student what is in an image.

python -m ekd_jax.predict --student_dir=DIR --image=FILE
"""

import pathlib
import sys

import numpy as np
from absl import flags

from ekd_jax import cli
from ekd_jax.students.student import load_student, read_image

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the command's own flags."""
    flags.DEFINE_string("student_dir", None, "directory of a student, as extract writes it", required=True)
    flags.DEFINE_string("image", None, "an image file", required=True)


def main() -> None:
    """Run the command."""
    student = load_student(FLAGS.student_dir)
    image = read_image(pathlib.Path(FLAGS.image), student)
    probabilities = np.asarray(student.predict(image))[0]
    for k in np.argsort(-probabilities)[:3]:
        print(f"{student.class_names[k]:<12} {100 * probabilities[k]:5.1f} %")


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
