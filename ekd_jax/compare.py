"""Compare methods: the same network, data, epochs and seeds for all, and one table.

    python -m ekd_jax.compare --config=configs/compare_digits.py [--workdir=DIR] [--seeds=3] [--methods=a,b]
        [--at_once=N] [--report] [--json]
    python -m ekd_jax.compare --runs=RUN,... [--baseline=RUN] [--workdir=DIR] [--json]

The second way trains nothing: RUN is the directory of a complete run, or of several seeds (`--config.seeds`). Runs that
differ in their seed alone share a row. Differences to the baseline are paired by seed, with 95 % confidence intervals.

The `get_config` of such a file returns, with `convert_dict=False` so that the labels keep their order,

    ConfigDict({
        "common": configuration of a run, as other recipes return it,
        "seeds": 3,
        "methods": {
            "baseline": {"method.name": "baseline"},
            "kd": {"method.name": "kd", "method.teachers": ("{baseline}:1",)},
        },
    }, convert_dict=False)

Every label stands for runs of `common` with knobs of its own, one per seed, from `common.seed` on. Where it sets
`method.name`, all other knobs of the method have their defaults. "{baseline}" is the directory of that label's
run with the same seed, which must come before. Network, data and epochs (`model.name`, `data.*`, `train.epochs`)
may differ only where "allow" lists the knob: `"allow": ("model.name",)`.

A run is one like any other, in WORKDIR/<label>/seed<k>. The same command resumes after an interruption; complete
runs are only read. The table is of all complete runs, whatever was trained this time.
"""

import json
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from ekd_jax import cli
from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError, nearest
from ekd_jax.common.log import logger
from ekd_jax.common.records import as_json, write_results
from ekd_jax.config.knobs import KNOBS
from ekd_jax.training.comparison import check, check_existing, entries, existing, selected
from ekd_jax.training.comparison_table import Comparison, as_markdown, as_text, compare
from ekd_jax.training.several import train_all

FLAGS = flags.FLAGS
JSON, MARKDOWN = "comparison.json", "comparison.md"


def define_flags() -> None:
    """Define the command's own flags."""
    cli.define_config()
    flags.DEFINE_string(
        "workdir", None, "directory of the comparison; runs/<name of the config> if not given"
    )
    flags.DEFINE_integer("seeds", None, "how many seeds, instead of the config's", 1, 1000)
    flags.DEFINE_list("methods", None, "labels to train, and those they refer to; all if not given")
    cli.define_at_once()
    flags.DEFINE_list("runs", None, "directories of runs, or of several seeds, to compare as they are")
    flags.DEFINE_string("baseline", None, "the directory that --runs are compared with")
    flags.DEFINE_list("allow", [], "knobs of network, data and epochs in which --runs may differ")
    flags.DEFINE_boolean("report", False, "train nothing: print the table of what is complete")
    flags.DEFINE_boolean("json", False, "print JSON")


def main() -> None:
    """Run the command."""
    if FLAGS.runs or FLAGS.baseline:
        _compare_existing()
        return
    if FLAGS.allow:
        raise UserError('--allow is for --runs: in a config it is a part, as in "allow": ("model.name",)')
    asked = cli.recipe("configs/compare_digits.py")
    if FLAGS.report and FLAGS.methods:
        raise UserError("--methods says what to train, and --report trains nothing: pass one of them")
    path = pathlib.Path(FLAGS.workdir or f"runs/{cli.config_name()}")
    runs = entries(asked, path, FLAGS.seeds)
    chosen = selected(runs, FLAGS.methods) if FLAGS.methods else runs
    check_existing(runs)
    parallel.shares(FLAGS.at_once or 1)
    if not FLAGS.report:
        check(chosen)
        train_all(chosen, at_once=FLAGS.at_once or 1)
    file = config_flags.get_config_filename(FLAGS["config"])
    _show(compare(runs), path, f"python -m ekd_jax.compare --config={file}")


def _compare_existing() -> None:
    """Compare the runs that --runs and --baseline name."""
    if not FLAGS.runs:
        raise UserError("--baseline is for --runs: pass --runs=RUN,...")
    other = [name for name in ("config", "seeds", "methods", "at_once", "report") if FLAGS[name].value]
    if other:
        raise UserError(f"--{other[0]} is for a comparison that is trained: leave it or --runs out")
    for knob in FLAGS.allow:
        if knob not in KNOBS:
            raise UserError(f"--allow: there is no knob {knob!r}{nearest(knob, KNOBS)}")
    baseline = [pathlib.Path(FLAGS.baseline)] if FLAGS.baseline else []
    paths = [*baseline, *map(pathlib.Path, FLAGS.runs)]
    runs = existing(list(dict.fromkeys(paths)), FLAGS.allow)
    found = compare(runs, str(baseline[0]) if baseline else "")
    command = f"python -m ekd_jax.compare --runs={','.join(FLAGS.runs)}"
    command += f" --baseline={FLAGS.baseline}" if baseline else ""
    command += f" --allow={','.join(FLAGS.allow)}" if FLAGS.allow else ""
    _show(found, pathlib.Path(FLAGS.workdir) if FLAGS.workdir else None, command)


def _show(found: Comparison, path: pathlib.Path | None, command: str) -> None:
    """Print a comparison, and write it into a directory if there is one."""
    print(json.dumps(as_json(found), indent=2) if FLAGS.json else as_text(found))
    if path is None:
        return
    again = "complete runs are intact: the same command with --report writes the table"
    write_results(path / JSON, as_json(found), path / MARKDOWN, as_markdown(found, command), again)
    logger.info(f"the table is in {path / MARKDOWN}, all numbers in {path / JSON}")


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
