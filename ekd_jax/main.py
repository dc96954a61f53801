"""Train a family of students.

    python -m ekd_jax.main --config=configs/digits.py [--workdir=DIR] [--config.SECTION.KNOB=VALUE ...]

Run the same command again to resume after an interruption. `--dry_run` prints what would happen.

Several processes, each with its own devices, train together. Started by Slurm, Open MPI, GKE or on a Cloud TPU
pod they find each other; elsewhere --coordinator, --num_processes and --process_id tell them.
"""

import contextlib
import os
import pathlib
import sys

from absl import flags

from ekd_jax import cli
from ekd_jax.common import parallel
from ekd_jax.training import plans
from ekd_jax.training.dry_run import dry_run
from ekd_jax.training.report import summary_table

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the command's own flags."""
    cli.define_config()
    flags.DEFINE_string("workdir", None, "directory of the run; runs/<name of the recipe> if not given")
    flags.DEFINE_boolean("dry_run", False, "print configuration, students, steps and memory; train nothing")
    flags.DEFINE_string("coordinator", None, "HOST:PORT that process 0 listens on, for several processes")
    flags.DEFINE_integer("num_processes", None, "how many processes train together", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0)
    flags.DEFINE_integer("coordinator_timeout", 300, "seconds to wait for the others", lower_bound=1)


def main() -> None:
    """Run the command."""
    config = cli.config()
    parallel.start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, FLAGS.coordinator_timeout)
    path = pathlib.Path(FLAGS.workdir or f"runs/{cli.config_name()}")
    with contextlib.ExitStack() as stack:
        if not parallel.is_main():  # process 0 speaks for all
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
        if FLAGS.dry_run:
            print(dry_run(config, path))
            return
        print(summary_table(plans.run(config, path)))
        print(f"everything is in {path}; extract a student with python -m ekd_jax.extract --workdir={path}")


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
