"""Step time and compile time of ensembles on the device at hand, on noise images.

    python benchmarks/step_time.py --models=resnet20,resnet110 --dtypes=float32,bfloat16 --json=out.json

Settings are measured in turn, again and again, so that a machine whose speed drifts treats them alike;
a figure is the median over the rounds. Compilation is timed apart. The step is the whole one: order,
augmentation, forward, backward, update.
"""

import itertools
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from ekd_jax import parallel
from ekd_jax.config import default, make_ensemble, make_method, resolve
from ekd_jax.data.images import Reader
from ekd_jax.data.resident import Resident
from ekd_jax.data.sources import Data, Facts, Pixels
from ekd_jax.optimizer import make_optimizer
from ekd_jax.state import init_state
from ekd_jax.step import make_train_steps, zero_metrics
from ekd_jax.workdir import environment
from ekd_jax.writers import table, write_json

FLAGS = flags.FLAGS
flags.DEFINE_list("models", ["resnet20"], "networks")
flags.DEFINE_list("students", ["5"], "numbers of students")
flags.DEFINE_list("dtypes", ["float32"], "float32, bfloat16")
flags.DEFINE_list("batch_sizes", ["128"], "examples a step")
flags.DEFINE_integer("steps", 3, "steps a dispatch")
flags.DEFINE_integer("rounds", 5, "times each setting is measured, after one that does not count")
flags.DEFINE_string("json", None, "file to write the figures to")

SHAPE, CLASSES, EXAMPLES = (32, 32, 3), 100, 10_000


class Setting:
    """One compiled training program with its state."""

    def __init__(self, model: str, students: int, dtype: str, batch_size: int):
        config = default()
        config.model.name, config.model.students = model, students
        config.train.dtype, config.train.batch_size = dtype, batch_size
        config = resolve(config)
        self.name = {"model": model, "students": students, "dtype": dtype, "batch": batch_size}
        self.batch_size = batch_size
        mesh = parallel.make_mesh()
        method, ensemble = make_method(config), make_ensemble(config, CLASSES)
        optimizer = make_optimizer(config, method, steps=1_000_000)
        state = init_state(ensemble, method, optimizer, 0, SHAPE)
        sums = zero_metrics(ensemble, method, state, SHAPE)
        generator = np.random.default_rng(0)
        images = generator.integers(0, 255, (EXAMPLES, *SHAPE), dtype=np.uint8)
        labels = generator.integers(0, CLASSES, EXAMPLES).astype(np.int32)
        noise = Pixels(images, labels, "noise")
        facts = Facts("noise", SHAPE, tuple(map(str, range(CLASSES))), EXAMPLES, 0, 0)
        feed = Resident(config, Data(facts, noise, None, noise, Reader(SHAPE)), mesh, "replicated")
        number = parallel.replicate(mesh, np.int32(FLAGS.steps))
        self.batches = feed.at(0), number, {"teachers": [], "key": jax.random.key_data(jax.random.key(0))}
        self.carry = parallel.replicate(mesh, (state, sums))
        train_steps = make_train_steps(config, ensemble, method, optimizer, feed, CLASSES, mesh, 1_000_000)
        began = time.perf_counter()
        lowered = train_steps.lower(*self.carry, *self.batches)
        self.trace_seconds = time.perf_counter() - began
        self.program = lowered.compile()
        self.compile_seconds = time.perf_counter() - began - self.trace_seconds
        self.step_seconds: list[float] = []

    def measure(self) -> float:
        """Seconds a step, over one dispatch."""
        began = time.perf_counter()
        self.carry = jax.block_until_ready(self.program(*self.carry, *self.batches))
        return (time.perf_counter() - began) / FLAGS.steps

    def figures(self) -> dict[str, Any]:
        """What is reported."""
        median = statistics.median(self.step_seconds)
        return {
            **self.name,
            "step_ms": round(1e3 * median, 2),
            "min_ms": round(1e3 * min(self.step_seconds), 2),
            "max_ms": round(1e3 * max(self.step_seconds), 2),
            "images_per_second": round(self.batch_size / median),
            "trace_s": round(self.trace_seconds, 1),
            "compile_s": round(self.compile_seconds, 1),
        }


def main(_: list[str]) -> None:
    """Measures every combination."""
    combinations = itertools.product(FLAGS.models, FLAGS.students, FLAGS.dtypes, FLAGS.batch_sizes)
    settings = [Setting(m, int(s), d, int(b)) for m, s, d, b in combinations]
    for setting in settings:
        setting.measure()
    for _ in range(FLAGS.rounds):
        for setting in settings:
            setting.step_seconds.append(setting.measure())
    rows = [setting.figures() for setting in settings]
    print(table([list(row.values()) for row in rows], list(rows[0])))
    where = environment()
    print(f"n = {FLAGS.rounds} rounds of {FLAGS.steps} steps; {where['devices']}, jax {where['jax']}")
    if FLAGS.json:
        write_json(pathlib.Path(FLAGS.json), {"environment": where, "rounds": FLAGS.rounds, "rows": rows})
        print(json.dumps({"written": FLAGS.json}))


if __name__ == "__main__":
    app.run(main)
