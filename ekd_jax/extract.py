"""Takes one student out of a run, as a folder that stands alone; also a command.

    python -m ekd_jax.extract --workdir=RUN --student=5 --output=DIR [--step=N | --best]
    python -m ekd_jax.extract --workdir=RUN --max_parameters=50000 --output=DIR

The folder holds `weights.safetensors` and `student.json` (architecture, class names, preprocessing,
metrics, provenance). `ekd_jax.load_student(DIR)` makes a model of it.
"""

import pathlib

from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.runs.extract import extract, fitting_student

FLAGS = flags.FLAGS


def main() -> None:
    """The command."""
    workdir = pathlib.Path(FLAGS.workdir)
    if (FLAGS.student is None) == (FLAGS.max_parameters is None):
        raise UserError("pass --student=N, or --max_parameters=N for the best student that fits")
    if FLAGS.step is not None and FLAGS.best:
        raise UserError("pass --step=N or --best, not both")
    student = FLAGS.student or fitting_student(workdir, FLAGS.max_parameters)
    description = extract(workdir, student, pathlib.Path(FLAGS.output), FLAGS.step, FLAGS.best)
    accuracy = description["metrics"].get("top1")
    print(
        f"student {student} of {workdir} at step {description['provenance']['step']} -> {FLAGS.output}: "
        f"{description['parameters']:,} parameters"
        + (f", {accuracy:.2f} % top-1" if accuracy is not None else "")
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    flags.DEFINE_string("output", None, "new folder to write", required=True)
    flags.DEFINE_integer("student", None, "which student, from 1")
    flags.DEFINE_integer("max_parameters", None, "the best student with at most so many parameters")
    flags.DEFINE_integer("step", None, "step of the checkpoint; the latest if not given")
    flags.DEFINE_boolean("best", False, "the kept checkpoint in which the student did best")
    cli.run(main)
