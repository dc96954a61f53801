"""Trains a family of students: python -m ekd_jax.main --config=configs/digits.py [--workdir=DIR]

Run the same command again to go on after an interruption. `--dry_run` prints what would happen.

Several processes, each on its own devices, train together: started by Slurm, Open MPI, GKE or on a Cloud
TPU pod they find each other; elsewhere --coordinator, --num_processes and --process_id tell them.
"""

import contextlib
import os
import pathlib
from typing import Any

from absl import flags

from ekd_jax import cli
from ekd_jax.common import parallel
from ekd_jax.training import plans as stages
from ekd_jax.training import report
from ekd_jax.training.dry_run import dry_run

FLAGS = flags.FLAGS


def main() -> None:
    """The command."""
    config = cli.config()
    parallel.start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, FLAGS.coordinator_timeout)
    with contextlib.ExitStack() as stack:
        if not parallel.is_main():
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
        _main(config)


def _main(config: Any) -> None:
    path = pathlib.Path(FLAGS.workdir or f"runs/{cli.config_name()}")
    if FLAGS.dry_run:
        print(dry_run(config, path))
        return
    summary = stages.run(config, path)
    print(report.summary_table(summary))
    print(f"everything is in {path}; take a student out with python -m ekd_jax.extract --workdir={path}")


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("workdir", None, "folder of the run; runs/<name of the config> if not given")
    flags.DEFINE_boolean("dry_run", False, "print configuration, students, steps and memory; train nothing")
    flags.DEFINE_string("coordinator", None, "HOST:PORT that process 0 listens at, for several processes")
    flags.DEFINE_integer("num_processes", None, "how many processes train together", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0)
    flags.DEFINE_integer("coordinator_timeout", 300, "seconds to wait for the others", lower_bound=1)
    cli.run(main)
