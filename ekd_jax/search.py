"""Search for good knobs with Optuna, by accuracy on validation images.

    python -m ekd_jax.search --config=configs/digits.py --space=configs/spaces/digits.py --trials=20
        --config.data.validation_examples=180 [--config.SECTION.KNOB=VALUE ...] [--workdir=DIR]

The function `get_space` of the space's file returns a dict of knobs. A list holds choices, a dict a range:

    {
        "optimizer.learning_rate": {"low": 0.01, "high": 1.0, "log": True},
        "method.temperature": {"low": 1, "high": 6, "step": 0.5},
        "train.batch_size": [32, 64, 128],
    }

--space also takes such a dict itself: --space="{'method.temperature': {'low': 1, 'high': 6}}".

A trial is a run like any other, in WORKDIR/trial<k>. The same command resumes after an interruption, in the middle of
a trial, too; a larger --trials adds some. Started several times with the same --workdir, on one GPU each, it trains as
many trials at once. It needs Optuna: pip install 'ekd_jax[search]'. More is in docs/search.md.
"""

import json
import pathlib
import shlex
import sys

from absl import flags
from ml_collections import config_flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.common.log import logger
from ekd_jax.common.records import as_json, write_results
from ekd_jax.config.space import check_space, read_space
from ekd_jax.training.search import MOST_TRIALS, SAMPLERS, run
from ekd_jax.training.search_database import check_optuna
from ekd_jax.training.search_found import FAILED, JSON, MARKDOWN, Found, Search
from ekd_jax.training.search_table import as_markdown, as_text, train_command

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the command's own flags."""
    cli.define_config()
    flags.DEFINE_string("space", None, "file whose function get_space returns the knobs to search over")
    flags.DEFINE_integer(
        "trials",
        None,
        f"how many trials in total, with those that are there; if not given, {MOST_TRIALS}, or all of a grid",
        1,
        1_000_000,
    )
    flags.DEFINE_string(
        "objective",
        "mean",
        "whose top-1 on the validation images after the last epoch is maximized: mean of the students, ensemble, "
        "student_1, student_2, ...",
    )
    flags.DEFINE_enum(
        "sampler",
        "tpe",
        SAMPLERS,
        "how values are drawn: by Optuna's TPE, at random, or every combination (grid); config.seed is their seed",
    )
    flags.DEFINE_boolean(
        "prune", False, "end a trial in its second half if it was never as good as the median of the others"
    )
    flags.DEFINE_string(
        "workdir", None, "directory of the search; runs/<name of the recipe>-search if not given"
    )
    flags.DEFINE_boolean("json", False, "print JSON")


def main() -> None:
    """Run the command."""
    check_optuna()
    config, overridden = cli.config(), config_flags.get_override_values(FLAGS["config"])
    if FLAGS.space is None:
        raise UserError("--space=FILE is missing; for example --space=configs/spaces/digits.py")
    search = Search(
        path=pathlib.Path(FLAGS.workdir or f"runs/{cli.config_name()}-search"),
        config=config,
        space=check_space(read_space(FLAGS.space), config, overridden),
        overridden=tuple(overridden),
        objective=FLAGS.objective,
        sampler=FLAGS.sampler,
        prune=FLAGS.prune,
    )
    found = run(search, FLAGS.trials)
    file = config_flags.get_config_filename(FLAGS["config"])
    command = train_command(found, file, overridden, str(search.path / "best"))
    print(json.dumps(as_json(found), indent=2) if FLAGS.json else as_text(found, command))
    _write(found, search.path, command)
    if found.best is None and (failed := found.in_state(FAILED)):
        raise UserError(
            f"no trial is complete, {len(failed)} failed; trial {failed[0].number}: {failed[0].reason}"
        )


def _own_command() -> str:
    """Return the command that makes the same search, but for where."""
    flags_given = [f"--config={config_flags.get_config_filename(FLAGS['config'])}"]
    overridden = config_flags.get_override_values(FLAGS["config"])
    flags_given += [f"--config.{knob}={value}" for knob, value in overridden.items()]
    own = ("space", "trials", "objective", "sampler", "prune")
    flags_given += [f"--{name}={FLAGS[name].value}" for name in own if FLAGS[name].present]
    return shlex.join(["python", "-m", "ekd_jax.search", *flags_given])


def _write(found: Found, path: pathlib.Path, command: str) -> None:
    """Write what was found into the directory of the search."""
    content, text = {**as_json(found), "train": command}, as_markdown(found, _own_command(), command)
    again = "all trials are intact: run the same command to write it again"
    write_results(path / JSON, content, path / MARKDOWN, text, again)
    logger.info(f"the table is in {path / MARKDOWN}, all numbers in {path / JSON}")


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
