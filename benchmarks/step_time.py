"""Measure the step time of ensembles on the available device with random images, alongside PyTorch's.

    python benchmarks/step_time.py --models=resnet20,resnet110 --dtypes=float32,bfloat16 --json=out.json
    python benchmarks/step_time.py --models=resnet32 --students=1,5 --executions=separate,packed
    python benchmarks/step_time.py --models=resnet20 --torch=eager,compile  # pip install "ekd_jax[parity]"

Settings are measured in turn, round by round, so that drifts of the machine's speed affect all of them; the
result is the median over the rounds. `first_s`, the time up to the end of the first step, is reported
separately. A step consists of order, augmentation, forward and backward pass, and update. All settings share
the base block, so that the difference between --methods=oem,baseline is the cost of the other losses.
"""

import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any, Protocol

import jax
from absl import app, flags
from program import Program, check_models, configuration

from ekd_jax.common.errors import UserError
from ekd_jax.common.files import write_json
from ekd_jax.common.text import table
from ekd_jax.runs.workdir import environment

FLAGS = flags.FLAGS
EXAMPLES = 10_000


class Setting(Protocol):
    """A setting whose steps are timed."""

    name: dict[str, Any]
    batch_size: int
    first_seconds: float

    def prepare(self) -> None:
        """Do everything up to the end of the first step."""

    def run(self, steps: int) -> None:
        """Take `steps` steps and wait for their end."""


class Ours:
    """The training program of ekd_jax with its state."""

    def __init__(self, model: str, students: int, batch_size: int, method: str, dtype: str, execution: str):
        knobs = {"train__dtype": dtype, "train__execution": execution, "model__sharing": "base"}
        config = configuration(model, students, batch_size, method, **knobs)
        variant = " ".join([dtype, *([execution] if execution != "auto" else []), method])
        self.name = {"model": model, "students": students, "batch": batch_size, "variant": variant}
        self.batch_size = batch_size
        self.program = Program(config, examples=max(EXAMPLES, batch_size))
        self.first_seconds = 0.0

    def prepare(self) -> None:
        """Trace and compile the program, and take one step."""
        began = time.perf_counter()
        self.compiled = self.program.lower().compile()
        self.run(1)
        self.first_seconds = time.perf_counter() - began

    def run(self, steps: int) -> None:
        """Take `steps` steps in one dispatch."""
        *self.program.carry, _ = jax.block_until_ready(self.compiled(*self.program.arguments(steps)))


def settings() -> list[Setting]:
    """Return the settings that the flags ask for.

    Raises:
        UserError: a network is unknown, or PyTorch is not installed.
    """
    check_models(FLAGS.models)
    found: list[Setting] = []
    for model, students, batch in itertools.product(
        FLAGS.models, map(int, FLAGS.students), map(int, FLAGS.batch_sizes)
    ):
        own = itertools.product(FLAGS.methods, FLAGS.dtypes, FLAGS.executions)
        found += [Ours(model, students, batch, *variant) for variant in own]
        if FLAGS.torch and students > 1:  # the reference is an ensemble
            from torch_reference import Reference

            found += [Reference(model, students, batch, variant) for variant in FLAGS.torch]
    return found


def row_of(setting: Setting, seconds: list[float], first_seconds: list[float]) -> dict[str, Any]:
    """Return the results of one setting.

    Args:
        setting: the setting.
        seconds: seconds per step in every round.
        first_seconds: those of the first setting, to which the ratio is taken round by round.
    """
    median = statistics.median(seconds)
    ratio = statistics.median(a / b for a, b in zip(seconds, first_seconds, strict=True))
    return {
        **setting.name,
        "step_ms": round(1e3 * median, 2),
        "min_ms": round(1e3 * min(seconds), 2),
        "max_ms": round(1e3 * max(seconds), 2),
        "images_per_second": round(setting.batch_size / median),
        "to_first": round(ratio, 2),
        "first_s": round(setting.first_seconds, 1),
    }


def main(_: list[str]) -> None:
    """Measure every combination and print a table."""
    timed = settings()
    for setting in timed:
        setting.prepare()
    seconds: list[list[float]] = [[] for _ in timed]
    for _ in range(FLAGS.rounds):
        for setting, own in zip(timed, seconds, strict=True):
            began = time.perf_counter()
            setting.run(FLAGS.steps)
            own.append((time.perf_counter() - began) / FLAGS.steps)
    rows = [row_of(s, own, seconds[0]) for s, own in zip(timed, seconds, strict=True)]
    print(table([list(row.values()) for row in rows], list(rows[0])))
    where = environment()
    if FLAGS.torch:
        from torch_reference import torch_environment

        where |= torch_environment()
    versions = ", ".join(f"{name} {where[name]}" for name in ("jax", "torch") if name in where)
    print(f"n = {FLAGS.rounds} rounds of {FLAGS.steps} steps; {where['devices']}, {versions}")
    if FLAGS.json:
        write_json(pathlib.Path(FLAGS.json), {"environment": where, "rounds": FLAGS.rounds, "rows": rows})
        print(json.dumps({"written": FLAGS.json}))


if __name__ == "__main__":
    flags.DEFINE_list("models", ["resnet20"], "networks")
    flags.DEFINE_list("students", ["5"], "numbers of students")
    flags.DEFINE_list("batch_sizes", ["128"], "examples per step")
    flags.DEFINE_list("methods", ["oem"], "method.name")
    flags.DEFINE_list("dtypes", ["float32"], "train.dtype: float32, bfloat16")
    flags.DEFINE_list("executions", ["separate"], "train.execution: separate, stacked, packed")
    flags.DEFINE_list("torch", [], "also time PyTorch: VARIANTS of torch_reference.py")
    flags.DEFINE_integer("steps", 3, "steps per dispatch")
    flags.DEFINE_integer("rounds", 5, "number of measurements of each setting, after its first step")
    flags.DEFINE_string("json", None, "file to write the results to")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to PyTorch
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
