"""Show how far a run is, how good and how fast: running, stopped or complete.

    python -m ekd_jax.status RUN [--follow] [--interval=SECONDS] [--json]

RUN may also be a directory of several runs, as `--config.seeds` and `compare` make them. Nothing is written, so
it can be called at any time, from another terminal or another machine that sees the directory. `--follow` shows
the table anew until the run ends; where the output is no terminal, it prints a line each time.
"""

import json
import pathlib
import shutil
import sys
import time

from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.common.log import renews_itself
from ekd_jax.common.progress import Block
from ekd_jax.common.records import as_json
from ekd_jax.runs.picture import draw
from ekd_jax.runs.status import RunStatus, as_text, follow, one_line, read_status

FLAGS = flags.FLAGS
ARGUMENTS = "RUN"  # the command line may name directories without a flag
TERMINAL_SECONDS, LOG_SECONDS = 2.0, 60.0


def define_flags() -> None:
    """Define the command's own flags."""
    flags.DEFINE_boolean("follow", False, "go on until the run ends")
    flags.DEFINE_float(
        "interval",
        None,
        f"seconds between two looks; {TERMINAL_SECONDS:g} on a terminal, else {LOG_SECONDS:g}, if not given",
        lower_bound=0.1,
        upper_bound=86_400,
    )
    flags.DEFINE_boolean("json", False, "print JSON")


def main(runs: list[str]) -> int | None:
    """Run the command."""
    if len(runs) != 1:
        raise UserError(f"name one directory, not {len(runs)}: ekd status RUN")
    if FLAGS.json and FLAGS.follow:
        raise UserError("pass --json or --follow, not both")
    if FLAGS.interval is not None and not FLAGS.follow:
        raise UserError("--interval is for --follow")
    path, terminal = pathlib.Path(runs[0]), renews_itself(sys.stdout)
    if not FLAGS.follow:
        _show(read_status(path), terminal)
        return None
    block = Block(_write)
    try:
        for status in follow(path, FLAGS.interval or (TERMINAL_SECONDS if terminal else LOG_SECONDS)):
            if terminal:
                block.show(draw(status, *shutil.get_terminal_size()))
            else:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {one_line(status)}", flush=True)
    except KeyboardInterrupt:  # how one ends it
        return 130
    return None


def _show(status: RunStatus, terminal: bool) -> None:
    if FLAGS.json:
        print(json.dumps(as_json(status), indent=2))
    elif terminal:
        print(draw(status, shutil.get_terminal_size().columns))
    else:
        print(as_text(status))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
