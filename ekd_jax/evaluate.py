"""Evaluate a run or an extracted student: every test example exactly once.

python -m ekd_jax.evaluate --workdir=RUN [--step=N | --best] [--split=validation] [--json]
python -m ekd_jax.evaluate --student_dir=DIR [--data_dir=DIR] [--manual_dir=DIR] [--json]
"""

import json
import sys

from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.common.log import logger
from ekd_jax.common.text import table
from ekd_jax.runs.evaluation import Results, evaluate_student
from ekd_jax.runs.run import load_run
from ekd_jax.students.student import load_student

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the command's own flags."""
    flags.DEFINE_string("workdir", None, "directory of a run")
    flags.DEFINE_string("student_dir", None, "directory of a student, as extract writes it")
    flags.DEFINE_string(
        "data_dir", "", "directory of prepared TFDS sets, if it is not where the run had it"
    )
    flags.DEFINE_string("manual_dir", "", "directory of archives, if it is not where the run had it")
    flags.DEFINE_integer("step", None, "step of the checkpoint; the latest if not given")
    flags.DEFINE_boolean("best", False, "the kept checkpoint in which the ensemble did best")
    flags.DEFINE_enum("split", "test", ["test", "validation"], "of a run: the examples to evaluate on")
    flags.DEFINE_boolean("json", False, "print JSON")


def main() -> None:
    """Run the command."""
    if (FLAGS.workdir is None) == (FLAGS.student_dir is None):
        raise UserError("pass --workdir=RUN, or --student_dir=DIR for an extracted student")
    if FLAGS.step is not None and FLAGS.best:
        raise UserError("pass --step=N or --best, not both")
    places = {"data_dir": FLAGS.data_dir, "manual_dir": FLAGS.manual_dir}
    if FLAGS.student_dir:
        found = evaluate_student(load_student(FLAGS.student_dir), places)
    else:
        run = load_run(FLAGS.workdir, FLAGS.step, FLAGS.best)
        found = run.evaluate(FLAGS.split, places)
        logger.info(f"{FLAGS.workdir}, step {run.checkpoint.step:,}")
    print(json.dumps(found, indent=2) if FLAGS.json else _as_text(found))


def _as_text(found: Results) -> str:
    names = list(dict.fromkeys(key.split("/")[0] for key in found))
    rows = [
        [n, f"{found[n + '/top1']:.2f}", f"{found[n + '/top5']:.2f}", f"{found[n + '/nll']:.4f}"]
        for n in names
    ]
    return table(rows, ["", "top-1 %", "top-5 %", "NLL"])


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
