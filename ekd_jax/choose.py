"""Choose the best student of a run within limits on what it costs.

    python -m ekd_jax.choose --workdir=RUN --max_latency_ms=0.5 --max_parameters=50000 --min_top1=98
    python -m ekd_jax.choose --workdir=RUN --max_megabytes=0.2 --extract=DIR [--format=onnx,openvino]

Prints the students that fit, best first by the top-1 that the run recorded at its last evaluation, on the validation
set if it held images out, and then the others, and why they do not fit. What was never measured is measured first, and
kept with the run. --extract writes the first one to DIR, as `extract` does, and with --format files for other runtimes
to DIR/exported, as `export` does. If no student fits, the exit code is 2.

The ensemble is not among them: it is no student that can be extracted. `benchmark` measures it, too.
"""

import json
import pathlib
import sys

import jax
from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.common.records import as_json
from ekd_jax.runs.choosing import (
    EXPORTED,
    Choice,
    Limits,
    as_text,
    check_extraction,
    check_limits,
    choose,
    extract,
)
from ekd_jax.runs.run import load_run
from ekd_jax.students.formats.registry import FORMATS
from ekd_jax.students.formats.timing import (
    RUNTIMES,
    THREADS,
    check_threads,
    chosen_runtimes,
    conditions,
    installed_runtimes,
)

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the command's own flags."""
    flags.DEFINE_string("workdir", None, "directory of the run; it may still be training", required=True)
    flags.DEFINE_float("max_latency_ms", None, "limit on the median time of a call, in milliseconds")
    flags.DEFINE_float("max_parameters", None, "limit on the number of parameters, such as 50000 or 0.27e6")
    flags.DEFINE_float("max_megabytes", None, "limit on the file that the runtime loads, in 10^6 bytes")
    flags.DEFINE_float("max_macs", None, "limit on multiply-accumulates for one image, such as 40e6")
    flags.DEFINE_float("min_top1", None, "least top-1 accuracy, in per cent")
    flags.DEFINE_string(
        "runtime",
        None,
        f"{', '.join(RUNTIMES)}: of latency and file; onnxruntime if it is installed, else jax",
    )
    flags.DEFINE_integer("batch_size", 1, "images in a call that is timed", lower_bound=1)
    flags.DEFINE_integer("threads", THREADS, "how many compute, and on how many CPUs the process is kept")
    flags.DEFINE_string("extract", None, "new directory for the best student that fits")
    flags.DEFINE_list("format", [], f"with --extract, files for other runtimes: {', '.join(FORMATS)}")
    flags.DEFINE_boolean("json", False, "print JSON")


def main() -> None:
    """Run the command."""
    limits = Limits(**{name: FLAGS[name].value for name in Limits.__dataclass_fields__})
    check_limits(limits)
    check_threads(FLAGS.threads)
    output = pathlib.Path(FLAGS.extract) if FLAGS.extract else None
    if output:
        check_extraction(output, FLAGS.format)
    elif FLAGS.format:
        raise UserError("--format needs --extract=DIR, where the files are written")
    default = "onnxruntime" if "onnxruntime" in installed_runtimes() else "jax"
    (runtime,) = chosen_runtimes([FLAGS.runtime or default])
    jax.config.update("jax_platforms", "cpu")  # an accelerator is left to the processes that are timed
    run = load_run(FLAGS.workdir)
    choice = choose(run, limits, conditions(runtime, FLAGS.threads), FLAGS.batch_size)
    print(
        json.dumps([as_json(each) for each in choice.candidates], indent=2)
        if FLAGS.json
        else as_text(choice)
    )
    if output:
        _extract(choice, output)
    else:
        _ = choice.winner  # raises if there is none


def _extract(choice: Choice, output: pathlib.Path) -> None:
    student, record = extract(choice, output, FLAGS.format)
    lines = [f"student {student.description.student} -> {output}"]
    for each in record.exported if record else ():
        lines.append(f"{each.format} -> {', '.join(str(output / EXPORTED / file) for file in each.files)}")
    print("\n".join(lines), file=sys.stderr if FLAGS.json else sys.stdout)


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
