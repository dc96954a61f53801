"""Step time of ensembles on the device at hand, on noise images, beside PyTorch's.

    python benchmarks/step_time.py --models=resnet20,resnet110 --dtypes=float32,bfloat16 --json=out.json
    python benchmarks/step_time.py --models=resnet32 --students=1,5 --executions=separate,packed
    python benchmarks/step_time.py --models=resnet20 --torch=eager,compile  # pip install "ekd_jax[parity]"

Settings are measured in turn, again and again, so that a machine whose speed drifts treats them alike;
a figure is the median over the rounds. `first_s`, what comes before the first step is done, is apart. The
step is the whole one: order, augmentation, forward, backward, update. With --methods=oem,baseline, all on a
shared base block, the difference is what the losses beside the cross entropy cost.
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
from program import Program, configuration

from ekd_jax import models
from ekd_jax.common.errors import UserError, nearest
from ekd_jax.common.files import write_json
from ekd_jax.common.text import table
from ekd_jax.runs.workdir import environment

FLAGS = flags.FLAGS
EXAMPLES = 10_000


class Setting(Protocol):
    """Something whose steps are timed."""

    name: dict[str, Any]
    batch_size: int
    first_seconds: float

    def prepare(self) -> None:
        """Everything up to the end of the first step."""

    def run(self, steps: int) -> None:
        """So many steps, to their end."""


class Ours:
    """A compiled training program with its state."""

    def __init__(self, model: str, students: int, batch_size: int, method: str, dtype: str, execution: str):
        knobs = {"train__dtype": dtype, "train__execution": execution, "model__sharing": "base"}
        config = configuration(model, students, batch_size, method, **knobs)
        variant = " ".join([dtype, *([execution] if execution != "auto" else []), method])
        self.name = {"model": model, "students": students, "batch": batch_size, "variant": variant}
        self.batch_size = batch_size
        self.program = Program(config, examples=max(EXAMPLES, batch_size))
        self.first_seconds = 0.0

    def prepare(self) -> None:
        """Traces, compiles and takes a step."""
        began = time.perf_counter()
        self.compiled = self.program.lower().compile()
        self.run(1)
        self.first_seconds = time.perf_counter() - began

    def run(self, steps: int) -> None:
        """In one dispatch."""
        *self.program.carry, _ = jax.block_until_ready(self.compiled(*self.program.arguments(steps)))


def settings() -> list[Setting]:
    """As the flags ask for them.

    Raises:
        UserError: an unknown network; no PyTorch.
    """
    unknown = [name for name in FLAGS.models if name not in models.MODELS]
    if unknown:
        raise UserError(f"--models: {unknown[0]} is unknown{nearest(unknown[0], models.MODELS)}")
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


def figures(setting: Setting, seconds: list[float], first: Setting, first_seconds: list[float]) -> dict:
    """What is reported of one setting; ratios are to the first, round by round."""
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
    """Measures every combination."""
    timed = settings()
    for setting in timed:
        setting.prepare()
    seconds: list[list[float]] = [[] for _ in timed]
    for _ in range(FLAGS.rounds):
        for setting, own in zip(timed, seconds, strict=True):
            began = time.perf_counter()
            setting.run(FLAGS.steps)
            own.append((time.perf_counter() - began) / FLAGS.steps)
    rows = [figures(s, own, timed[0], seconds[0]) for s, own in zip(timed, seconds, strict=True)]
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
    flags.DEFINE_list("batch_sizes", ["128"], "examples a step")
    flags.DEFINE_list("methods", ["oem"], "method.name")
    flags.DEFINE_list("dtypes", ["float32"], "train.dtype: float32, bfloat16")
    flags.DEFINE_list("executions", ["separate"], "train.execution: separate, stacked, packed")
    flags.DEFINE_list("torch", [], "PyTorch's, too: VARIANTS of torch_reference.py")
    flags.DEFINE_integer("steps", 3, "steps a dispatch")
    flags.DEFINE_integer("rounds", 5, "times each setting is measured, after the first step")
    flags.DEFINE_string("json", None, "file to write the figures to")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
