"""Compares methods: the same network, data, epochs and seeds for all, and one table.

    python -m ekd_jax.compare --config=configs/compare_digits.py [--workdir=DIR] [--seeds=3] [--methods=a,b]
        [--report] [--json]

The `get_config` of such a file gives, with `convert_dict=False` so that the labels keep their order,

    ConfigDict({
        "common": configuration of a run, as other recipes give it,
        "seeds": 3,
        "methods": {
            "baseline": {"method.name": "baseline"},
            "kd": {"method.name": "kd", "method.teachers": ("{baseline}:1",)},
        },
    }, convert_dict=False)

Every label stands for runs of `common` with knobs of its own, one a seed, from `common.seed` on; where it
sets `method.name`, all other knobs of the method have its defaults. "{baseline}" is the folder of that
label's run of the same seed, and must come before. Network, data and epochs (`model.name`, `data.*`,
`train.epochs`) may differ only where "allow" lists the knob: `"allow": ("model.name",)`.

A run is one like any other, in WORKDIR/<label>/seed<k>. The same command goes on after an interruption;
complete runs are only read. The table is of all complete runs, whatever was trained this time.
"""

import json
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import write_bytes, write_json
from ekd_jax.training.comparison import check, check_existing, plan, selected, train_all
from ekd_jax.training.comparison_table import as_markdown, as_text, results

FLAGS = flags.FLAGS
JSON, MARKDOWN = "comparison.json", "comparison.md"


def main() -> None:
    """The command."""
    if FLAGS.config is None:
        raise UserError("--config=FILE is missing; for example --config=configs/compare_digits.py")
    if FLAGS.report and FLAGS.methods:
        raise UserError("--methods says what to train, and --report trains nothing: pass one of them")
    path = pathlib.Path(FLAGS.workdir or f"runs/{cli.config_name()}")
    try:
        runs = plan(FLAGS.config, path, FLAGS.seeds)
    except OSError as error:  # what a config file that is not there raises when it is looked at
        raise UserError(reason(error)) from error
    chosen = selected(runs, FLAGS.methods) if FLAGS.methods else runs
    check_existing(runs)
    if not FLAGS.report:
        check(chosen)
        train_all(chosen)
    found = results(runs)
    file = config_flags.get_config_filename(FLAGS["config"])
    write_json(path / JSON, found)
    text = as_markdown(found, f"python -m ekd_jax.compare --config={file}")
    write_bytes(path / MARKDOWN, text.encode())
    print(json.dumps(found, indent=2) if FLAGS.json else as_text(found))
    print(f"the table is in {path / MARKDOWN}, all numbers in {path / JSON}", file=sys.stderr)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("workdir", None, "folder of the comparison; runs/<name of the config> if not given")
    flags.DEFINE_integer("seeds", None, "how many seeds, instead of the config's", lower_bound=1)
    flags.DEFINE_list("methods", None, "labels to train, and those they refer to; all if not given")
    flags.DEFINE_boolean("report", False, "train nothing: the table of what is complete")
    flags.DEFINE_boolean("json", False, "print JSON")
    cli.run(main)
