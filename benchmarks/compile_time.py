"""Measure seconds to build, trace and compile the training step, and its memory, for any networks.

    python benchmarks/compile_time.py --models=resnet20,resnet110 --json=out.json
    python benchmarks/compile_time.py --models=resnet20 --students=1,5 --batch_sizes=64,128

Every setting runs in its own process, one after the other, and nothing is cached. "build" is the time for
shapes, initial values and the description. Memory is XLA's account of the compiled program: its arguments
(state and images), the part of them that is donated, whose place the new state takes, and the largest amount of
temporary memory.
"""

import itertools
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
from absl import app, flags
from program import Program, check_models, configuration, is_for_imagenet

from ekd_jax.common.errors import UserError
from ekd_jax.common.files import write_json
from ekd_jax.common.text import table
from ekd_jax.runs.workdir import environment

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "models",
    [
        "resnet20", "resnet110", "resnet18", "resnet50", "resnet101", "resnext50_32x4d", "wrn_40_2",
        "vgg13", "densenet_bc_12_100", "densenet121", "efficientnet_b0", "efficientnet_b4",
        "mobilenet_v2", "shufflenet_v1_cifar", "shufflenet_v2_x1_0",
    ],
    "networks",
)  # fmt: skip
flags.DEFINE_list("students", ["5"], "numbers of students")
flags.DEFINE_list("batch_sizes", ["32"], "examples per step")
flags.DEFINE_enum("rematerialize", "no", ["no", "yes", "both"], "train.rematerialize")
flags.DEFINE_integer("image_size", 0, "pixels; 0: 224 for ImageNet networks, else 32")
flags.DEFINE_integer("limit", 1200, "seconds after which a setting is skipped")
flags.DEFINE_string("json", None, "file to write the results to")
flags.DEFINE_string("measure", None, "used by child processes: the arguments of `measure`")


def measure(name: str, students: int, batch_size: int, rematerialize: bool, size: int) -> dict[str, Any]:
    """Return the row of one setting."""
    large = is_for_imagenet(name)
    size, classes = size or (224 if large else 32), 1000 if large else 100
    config = configuration(name, students, batch_size, train__rematerialize=rematerialize)
    started = time.perf_counter()
    program = Program(config, size, classes)
    built = time.perf_counter() - started
    started = time.perf_counter()
    lowered = program.lower()
    traced = time.perf_counter() - started
    started = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    return {
        "model": name,
        "students": students,
        "batch": batch_size,
        "again": "blocks" if rematerialize else "-",
        "image": size,
        "build s": round(built, 1),
        "trace s": round(traced, 1),
        "compile s": round(time.perf_counter() - started, 1),
        "arguments MB": round(memory.argument_size_in_bytes / 1e6),
        "donated MB": round(memory.alias_size_in_bytes / 1e6),
        "temporary MB": round(memory.temp_size_in_bytes / 1e6),
    }


def main(_: list[str]) -> None:
    """Measure every setting and print a table."""
    if FLAGS.measure:
        print(json.dumps(measure(*json.loads(FLAGS.measure))))
        return
    check_models(FLAGS.models)
    rows = []
    again = {"both": (False, True), "yes": (True,), "no": (False,)}[FLAGS.rematerialize]
    for name, students, batch_size, rematerialize in itertools.product(
        FLAGS.models, map(int, FLAGS.students), map(int, FLAGS.batch_sizes), again
    ):
        setting = json.dumps([name, students, batch_size, rematerialize, FLAGS.image_size])
        command = [sys.executable, __file__, f"--measure={setting}"]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, check=True, text=True, timeout=FLAGS.limit
            )
        except subprocess.TimeoutExpired:
            print(f"{setting}: skipped after {FLAGS.limit} s", file=sys.stderr)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(" ".join(map(str, rows[-1].values())), file=sys.stderr, flush=True)
    print(table([list(row.values()) for row in rows], list(rows[0])))
    note = f"n = 1; {jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(note)
    if FLAGS.json:
        write_json(pathlib.Path(FLAGS.json), {"environment": environment(), "note": note, "rows": rows})


if __name__ == "__main__":
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
