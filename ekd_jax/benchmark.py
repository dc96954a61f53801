"""Measure how fast students run, and in how much memory, in the runtimes they are exported for.

    python -m ekd_jax.benchmark --workdir=RUN [--student=N|ensemble|all] [--runtime=jax,onnxruntime,openvino]
    python -m ekd_jax.benchmark --student_dir=DIR --batch_sizes=1,64 --threads=1 [--output=benchmark.json]

What is timed is the file that `export` writes, in float32, for JAX the program that `jax.jit` makes. Each time is
taken in processes of its own, which are kept on as many CPUs as there are threads. Measurements of a run are kept
in its directory, as `benchmark.json`, where `choose` finds them.
"""

import json
import pathlib
import sys

import jax
from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.common.log import logger
from ekd_jax.common.records import as_json, write_record
from ekd_jax.runs.benchmarking import Benchmark, as_text, keep, subjects
from ekd_jax.runs.records import BENCHMARK
from ekd_jax.runs.run import load_run
from ekd_jax.students.formats.timing import (
    BATCH_SIZES,
    ROUNDS,
    RUNTIMES,
    SECONDS,
    THREADS,
    Subject,
    check_threads,
    chosen_runtimes,
    conditions,
    measure,
    student_subject,
)
from ekd_jax.students.student import load_student

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the command's own flags."""
    flags.DEFINE_multi_string(
        "student_dir", None, "directory of a student, as extract writes it; may be repeated"
    )
    flags.DEFINE_string(
        "workdir", None, "directory of a run, instead of students; it may still be training"
    )
    flags.DEFINE_string(
        "student", "all", "of the run: number of the student, from 1, or `ensemble`, or `all`"
    )
    flags.DEFINE_integer("step", None, "of the run: step of the checkpoint; the latest if not given")
    flags.DEFINE_list(
        "runtime",
        [],
        f"runtimes, separated by commas: {', '.join(RUNTIMES)}; all that are installed if not given",
    )
    flags.DEFINE_list("batch_sizes", [str(size) for size in BATCH_SIZES], "numbers of images in a call")
    flags.DEFINE_integer("threads", THREADS, "how many compute, and on how many CPUs a process is kept")
    flags.DEFINE_float("seconds", SECONDS, "of timing for each row, warm-up not counted", lower_bound=0.001)
    flags.DEFINE_integer("rounds", ROUNDS, "processes that share these seconds, in turn", lower_bound=1)
    flags.DEFINE_string(
        "output", None, "JSON file to write, instead of `benchmark.json` in the run's directory"
    )
    flags.DEFINE_boolean("json", False, "print JSON")


def main() -> None:
    """Run the command."""
    if bool(FLAGS.student_dir) == bool(FLAGS.workdir):
        raise UserError("pass --workdir=RUN, or --student_dir=DIR for an extracted student")
    check_threads(FLAGS.threads)
    output, sizes, runtimes = (
        cli.output_file("output", (".json",)),
        _batch_sizes(),
        chosen_runtimes(FLAGS.runtime),
    )
    jax.config.update("jax_platforms", "cpu")  # an accelerator is left to the processes that are timed
    networks = _subjects()
    found = [conditions(runtime, FLAGS.threads) for runtime in runtimes]
    new = measure(networks, found, sizes, FLAGS.seconds, FLAGS.rounds)
    print(json.dumps(as_json(Benchmark(new)), indent=2) if FLAGS.json else as_text(new))
    if output:
        try:
            write_record(output, Benchmark(new))
        except OSError as error:
            raise UserError(
                f"cannot write --output={output}: {error.strerror}; the results were printed"
            ) from error
    elif FLAGS.workdir and keep(pathlib.Path(FLAGS.workdir), new):
        logger.info(f"kept in {FLAGS.workdir}/{BENCHMARK}")


def _subjects() -> list[Subject]:
    """Return the networks that the flags name."""
    if FLAGS.workdir:
        return subjects(load_run(FLAGS.workdir, FLAGS.step), FLAGS.student)
    for flag in ("student", "step"):
        if FLAGS[flag].present:
            raise UserError(f"--{flag} belongs to --workdir, not to --student_dir")
    return [student_subject(load_student(name), name) for name in dict.fromkeys(FLAGS.student_dir)]


def _batch_sizes() -> list[int]:
    """Return the batch sizes that are asked for, each once."""
    for text in FLAGS.batch_sizes:
        if not (text.isdecimal() and 1 <= int(text) <= 10**6):
            raise UserError(
                f"--batch_sizes={','.join(FLAGS.batch_sizes)}: {text!r} is not a number of images, from 1"
            )
    return list(dict.fromkeys(map(int, FLAGS.batch_sizes)))


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
