"""Evaluation over every test example exactly once; also a command.

python -m ekd_jax.evaluate --workdir=RUN [--step=N | --best] [--split=validation] [--json]
python -m ekd_jax.evaluate --student_dir=DIR [--data_dir=DIR] [--manual_dir=DIR] [--json]
"""

import json
import pathlib
import sys

from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.common.text import table
from ekd_jax.runs.evaluation import Results, evaluate_run, evaluate_student
from ekd_jax.students.student import load_student

FLAGS = flags.FLAGS


def as_text(found: Results) -> str:
    """Results as a table."""
    names = list(dict.fromkeys(key.split("/")[0] for key in found))
    rows = [
        [n, f"{found[n + '/top1']:.2f}", f"{found[n + '/top5']:.2f}", f"{found[n + '/nll']:.4f}"]
        for n in names
    ]
    return table(rows, ["", "top-1 %", "top-5 %", "NLL"])


def main() -> None:
    """The command."""
    if (FLAGS.workdir is None) == (FLAGS.student_dir is None):
        raise UserError("pass --workdir=RUN, or --student_dir=DIR for a student that was taken out")
    if FLAGS.step is not None and FLAGS.best:
        raise UserError("pass --step=N or --best, not both")
    folders = {"data_dir": FLAGS.data_dir, "manual_dir": FLAGS.manual_dir}
    if FLAGS.student_dir:
        found = evaluate_student(load_student(FLAGS.student_dir), folders)
    else:
        step, found = evaluate_run(
            pathlib.Path(FLAGS.workdir), FLAGS.step, FLAGS.best, folders, FLAGS.split
        )
        print(f"{FLAGS.workdir}, step {step:,}", file=sys.stderr)
    print(json.dumps(found, indent=2) if FLAGS.json else as_text(found))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of a run")
    flags.DEFINE_string("student_dir", None, "folder that ekd_jax.extract wrote")
    flags.DEFINE_string("data_dir", "", "where TFDS keeps prepared sets, if not where the run had them")
    flags.DEFINE_string("manual_dir", "", "folder of archives, if not where the run had them")
    flags.DEFINE_integer("step", None, "step of the checkpoint; the latest if not given")
    flags.DEFINE_boolean("best", False, "the kept checkpoint in which the ensemble did best")
    flags.DEFINE_enum("split", "test", ["test", "validation"], "of a run: what to measure on")
    flags.DEFINE_boolean("json", False, "print JSON")
    cli.run(main)
