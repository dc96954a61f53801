"""Evaluate a run or an extracted student: every example of a split exactly once.

    python -m ekd_jax.evaluate --workdir=RUN [--step=N | --best] [--split=validation] [--json]
    python -m ekd_jax.evaluate --student_dir=DIR [--data=NAME] [--data_dir=DIR] [--split=all] [--per_class]
    python -m ekd_jax.evaluate --student_dir=DIR --data=folder --data_dir=PHOTOS --confusion=confusion.csv

Classes are matched by name. A set may lack some of the student's classes, and is then evaluated over those it has.
"""

import json
import pathlib
import sys
from typing import Any

from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.common.files import write_bytes
from ekd_jax.common.log import logger
from ekd_jax.common.text import csv_text, table
from ekd_jax.runs.evaluation import SPLITS, Evaluation, evaluate_student
from ekd_jax.runs.run import load_run
from ekd_jax.students.student import load_student

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the command's own flags."""
    flags.DEFINE_string("workdir", None, "directory of a run")
    flags.DEFINE_string("student_dir", None, "directory of a student, as extract writes it")
    flags.DEFINE_string("data", "", "data set to evaluate on, if it is not the one that was trained on")
    flags.DEFINE_string(
        "data_dir",
        "",
        "directory of prepared TFDS sets, if it is not where the run had it; of --data=folder",
    )
    flags.DEFINE_string("manual_dir", "", "directory of archives, if it is not where the run had it")
    flags.DEFINE_string(
        "test_split", None, "split or directory of test images, if not as in training; empty: the usual one"
    )
    flags.DEFINE_enum(
        "corrupt", None, ["fatal", "skip"], "skip: leave out images that cannot be read, and count them"
    )
    flags.DEFINE_integer("step", None, "step of the checkpoint; the latest if not given")
    flags.DEFINE_boolean("best", False, "the kept checkpoint in which the ensemble did best")
    flags.DEFINE_enum("split", "test", SPLITS, "images to evaluate on; validation: those a run held out")
    flags.DEFINE_boolean("per_class", False, "print recall, precision and F1 of every class")
    flags.DEFINE_string("confusion", None, "CSV file to write the confusion matrix to")
    flags.DEFINE_string("predictor", None, "of a run, for --per_class and --confusion: student_2, ensemble")
    flags.DEFINE_boolean("json", False, "print JSON")


def main() -> None:
    """Run the command."""
    if bool(FLAGS.workdir) == bool(FLAGS.student_dir):
        raise UserError("pass --workdir=RUN, or --student_dir=DIR for an extracted student")
    confusion = cli.output_file("confusion", (".csv",))
    data = {name: FLAGS[name].value for name in ("data_dir", "manual_dir", "test_split", "corrupt")}
    data["name"] = FLAGS.data
    if FLAGS.student_dir:
        _refuse_flags_of_runs()
        student = load_student(FLAGS.student_dir)
        found = evaluate_student(student, data, split=FLAGS.split, confusion=bool(confusion))
    else:
        cli.check_checkpoint_flags()
        run = load_run(FLAGS.workdir, FLAGS.step, FLAGS.best)
        _predictor(tuple(run.names))
        found = run.evaluate(FLAGS.split, data, confusion=bool(confusion))
        logger.info(f"{FLAGS.workdir}, step {run.checkpoint.step:,}")
    print(json.dumps(_as_json(found), indent=2) if FLAGS.json else _as_text(found))
    if confusion:
        _write_confusion(confusion, found)


def _refuse_flags_of_runs() -> None:
    """Raise UserError for a flag that has no meaning for an extracted student."""
    for name in ("step", "best", "predictor"):
        if FLAGS[name].present:
            raise UserError(f"--{name} is for a run: pass --workdir=RUN, or leave it out")
    if FLAGS.split == "validation":
        raise UserError("--split=validation is for a run, which held images out: pass --workdir=RUN")


def _predictor(names: tuple[str, ...]) -> str:
    """Return the predictor that is shown class by class: the one asked for, or the only one.

    Raises:
        UserError: there are several and none was asked for, or there is no such predictor.
    """
    if len(names) == 1:
        return names[0]
    if FLAGS.predictor is None:
        if not FLAGS.per_class and FLAGS.confusion is None:
            return ""
        raise UserError(f"--per_class and --confusion need --predictor=NAME: {', '.join(names)}")
    if FLAGS.predictor not in names:
        raise UserError(f"--predictor={FLAGS.predictor} is unknown: choose one of {', '.join(names)}")
    return str(FLAGS.predictor)


def _write_confusion(path: pathlib.Path, found: Evaluation) -> None:
    """Write a row per class and a column per predicted class."""
    assert found.counts.confusion is not None
    counts = found.counts.confusion[found.names.index(_predictor(found.names))]
    rows: list[list[Any]] = [["class \\ predicted", *found.class_names]]
    rows += [[name, *row] for name, row in zip(found.class_names, counts.tolist(), strict=True)]
    try:
        write_bytes(path, csv_text(rows).encode())
    except OSError as error:
        raise UserError(
            f"cannot write --confusion={path}: {error.strerror}; the other results were printed"
        ) from error


def _as_json(found: Evaluation) -> dict[str, Any]:
    everything: dict[str, Any] = {**found.metrics, "images": found.examples, "absent_classes": found.absent}
    if FLAGS.per_class:
        everything["classes"] = found.of_classes(_predictor(found.names))
    return everything


def _as_text(found: Evaluation) -> str:
    columns = {"top1": ".2f", "top5": ".2f", "nll": ".4f", "macro_recall": ".2f", "macro_f1": ".2f"}
    rows = [[n, *(f"{found[f'{n}/{key}']:{form}}" for key, form in columns.items())] for n in found.names]
    lines = [table(rows, ["", "top-1 %", "top-5 %", "NLL", "macro recall %", "macro F1 %"])]
    lines.append(f"{found.examples:,} images")
    if FLAGS.per_class:
        lines.append("")
        by_class = [
            [name, *(f"{v:,}" if isinstance(v, int) else f"{v:.2f}" for v in values.values())]
            for name, values in found.of_classes(_predictor(found.names)).items()
        ]
        lines.append(table(by_class, ["class", "images", "recall %", "precision %", "F1 %"]))
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
