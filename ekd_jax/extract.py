"""Extract one student of a run, as a directory that stands alone.

    python -m ekd_jax.extract --workdir=RUN --student=5 --output=DIR [--step=N | --best]
    python -m ekd_jax.extract --workdir=RUN --max_parameters=50000 --output=DIR

The directory holds `weights.safetensors`, `student.json` (network, class names, preprocessing, metrics, provenance)
and `README.md`, a model card. `ekd_jax.load_student(DIR)` loads it.
"""

import pathlib
import sys

from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.runs.run import load_run
from ekd_jax.students.student import check_output, write_student

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the command's own flags."""
    flags.DEFINE_string("workdir", None, "directory of the run", required=True)
    flags.DEFINE_string("output", None, "new directory to write", required=True)
    flags.DEFINE_integer("student", None, "number of the student, from 1")
    flags.DEFINE_integer("max_parameters", None, "the best student with at most this many parameters")
    flags.DEFINE_integer("step", None, "step of the checkpoint; the latest if not given")
    flags.DEFINE_boolean("best", False, "the kept checkpoint in which the student did best")
    flags.DEFINE_boolean(
        "per_class",
        True,
        "evaluate the student on the test images, for the scores by class on its card",
    )


def main() -> None:
    """Run the command."""
    if (FLAGS.student is None) == (FLAGS.max_parameters is None):
        raise UserError("pass --student=N, or --max_parameters=N for the best student that fits")
    cli.check_checkpoint_flags()
    output = pathlib.Path(FLAGS.output)
    check_output(output)
    run = load_run(FLAGS.workdir, FLAGS.step, FLAGS.best)
    number = run.best_student_within(FLAGS.max_parameters) if FLAGS.student is None else FLAGS.student
    student = run.student(number)
    student = run.with_scores_if_known(student) if FLAGS.per_class else student
    own = write_student(output, student).description
    accuracy = f", {own.metrics['top1']:.2f} % top-1 ({own.evaluated_on})" if own.metrics else ""
    print(
        f"student {number} of {FLAGS.workdir} at step {own.provenance.step} -> {output}: "
        f"{own.parameters:,} parameters{accuracy}"
    )


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
