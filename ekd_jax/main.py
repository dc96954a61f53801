"""Train a family of students.

    python -m ekd_jax.main --config=configs/digits.py [--workdir=DIR] [--config.SECTION.KNOB=VALUE ...]

Run the same command again to resume after an interruption. `--dry_run` prints what would happen.

`--config.seeds="(0,1,2)"` trains a run for each seed and prints mean and standard deviation; `--at_once=3` trains
them side by side on several devices (docs/training.md).

A run may go on with other knobs: --resume_with=optimizer.learning_rate=0.01 changes one, --extend all that
--config and its knobs ask for, as in --extend --config.train.epochs=400. --from_run=RUN --workdir=NEW does the same
in a copy of a run (docs/reliability.md).

Several processes, each with its own devices, train together. Started by Slurm, Open MPI, GKE or on a Cloud TPU
pod they find each other; elsewhere --coordinator, --num_processes and --process_id tell them.
"""

import contextlib
import os
import pathlib
import sys

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

from ekd_jax import cli
from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.runs import history
from ekd_jax.runs.history import Permit, can_change
from ekd_jax.training import plans, seeds
from ekd_jax.training.comparison_table import as_text
from ekd_jax.training.dry_run import dry_run
from ekd_jax.training.profile import MOST
from ekd_jax.training.replay import replay
from ekd_jax.training.report import summary_table

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the command's own flags."""
    cli.define_config()
    flags.DEFINE_string("workdir", None, "directory of the run; runs/<name of the recipe> if not given")
    flags.DEFINE_multi_string(
        "resume_with",
        [],
        "KNOB=VALUE: go on with another value than the run was started with; may be repeated",
    )
    flags.DEFINE_boolean(
        "extend", False, "go on with another configuration, such as more epochs, from where the run stands"
    )
    flags.DEFINE_string("from_run", None, "a run of which --workdir becomes a copy that goes on by itself")
    flags.DEFINE_integer("replay_step", None, "find the first array of this step that is not finite", 1)
    flags.DEFINE_integer(
        "profile",
        None,
        "trace so many steps, after some to warm up, into RUN/profile",
        lower_bound=1,
        upper_bound=MOST,
    )
    cli.define_at_once()
    flags.DEFINE_boolean(
        "deterministic",
        False,
        "the same bits each time on a GPU, too, if it takes longer (docs/reliability.md)",
    )
    flags.DEFINE_boolean("dry_run", False, "print configuration, students, steps and memory; train nothing")
    flags.DEFINE_string("coordinator", None, "HOST:PORT that process 0 listens on, for several processes")
    flags.DEFINE_integer("num_processes", None, "how many processes train together", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0)
    flags.DEFINE_integer("coordinator_timeout", 300, "seconds to wait for the others", lower_bound=1)


def main() -> None:
    """Run the command."""
    config = cli.config()
    if FLAGS.deterministic:
        config = _deterministic(config)
    parallel.start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, FLAGS.coordinator_timeout)
    path = pathlib.Path(FLAGS.workdir or f"runs/{cli.config_name()}")
    with contextlib.ExitStack() as stack:
        if not parallel.is_main():  # process 0 speaks for all
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
        permit = _permit()
        _check_flags(config)
        if FLAGS.dry_run:
            print(dry_run(config, path, permit))
            return
        if FLAGS.replay_step:
            print(replay(config, path, FLAGS.replay_step))
            return
        if FLAGS.from_run:
            history.branch(pathlib.Path(FLAGS.from_run), path)
        if config.seeds:
            print(as_text(seeds.run(config, path, permit=permit, at_once=FLAGS.at_once or 1)))
            print(
                f"everything is in {path}, a directory for each seed; the table is in {path / seeds.MARKDOWN}"
            )
            return
        print(summary_table(plans.run(config, path, permit=permit, profile=FLAGS.profile or 0)))
        print(f"everything is in {path}; extract a student with python -m ekd_jax.extract --workdir={path}")


def _check_flags(config: FrozenConfigDict) -> None:
    """Raise UserError for a flag that is for one run, if there are several seeds, or the other way round."""
    if FLAGS.at_once and not config.seeds:
        raise UserError("--at_once is for several seeds, as in --config.seeds='(0,1,2)'")
    if FLAGS.profile and (other := [f for f in ("dry_run", "replay_step") if FLAGS[f].value]):
        raise UserError(f"--profile traces training, and --{other[0]} trains nothing: pass one of them")
    for flag in ("replay_step", "from_run", "profile"):
        if config.seeds and FLAGS[flag].value:
            raise UserError(
                f"--{flag} is for one run, not for config.seeds={config.seeds}: ask for one seed, as in "
                f"--config.seeds='()' --config.seed={config.seeds[0]}, and name its --workdir"
            )


def _deterministic(config: FrozenConfigDict) -> FrozenConfigDict:
    """Return a configuration whose run computes the same bits each time, and tell XLA to; JAX must not have begun.

    How branches run is not measured then, because each way rounds differently.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    settled = ConfigDict(config)
    if settled.train.execution == "auto":
        settled.train.execution = "separate"
    return FrozenConfigDict(settled)


def _permit() -> Permit | None:
    """Return what of the configuration may be another one than the run was started with.

    Raises:
        UserError: flags that do not make sense together, or a knob that cannot change.
    """
    asked = [name for name in ("resume_with", "extend", "from_run") if FLAGS[name].value]
    if len(asked) > 1:
        raise UserError(f"pass one of {' and '.join(f'--{name}' for name in asked)}, not both")
    if FLAGS.resume_with:
        knobs = tuple(change.partition("=")[0] for change in FLAGS.resume_with)
        if fixed := [knob for knob in knobs if not can_change(knob)]:
            raise UserError(
                f"--resume_with: {fixed[0]} cannot change once a run has started: start a new run"
            )
        return Permit("--resume_with", knobs)
    return Permit(f"--{asked[0]}") if asked else None


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
