"""Seconds to build, trace and compile the training step, and its memory, for any networks.

    python benchmarks/compile_time.py --models=resnet20,resnet110 --json=out.json

Every network in a process of its own, one after the other; nothing is cached. "build" is shapes, initial
values and the description; memory is what XLA says of the compiled program: its arguments (state and
images), and the most it holds beside them.
"""

import json
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
from absl import app, flags

from ekd_jax import models, parallel
from ekd_jax.config import default, make_ensemble, make_method, resolve
from ekd_jax.data.images import Reader
from ekd_jax.data.resident import Resident
from ekd_jax.data.sources import Data, Facts, Pixels
from ekd_jax.describe import describe
from ekd_jax.errors import UserError, nearest
from ekd_jax.optimizer import make_optimizer
from ekd_jax.state import init_state
from ekd_jax.step import make_train_steps, zero_metrics
from ekd_jax.workdir import environment
from ekd_jax.writers import table, write_json

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
flags.DEFINE_integer("students", 5, "how many")
flags.DEFINE_integer("batch_size", 32, "examples a step")
flags.DEFINE_integer("image_size", 0, "0: 224 for networks of ImageNet, else 32")
flags.DEFINE_integer("limit", 1200, "seconds after which a network is given up")
flags.DEFINE_string("json", None, "file to write the figures to")
flags.DEFINE_string("measure", None, "of a child process: the network")

IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext", "wide_resnet")
IMAGENET += ("densenet121", "efficientnet", "mobilenet_v2", "shufflenet_v2_x")


def measure(name: str) -> dict[str, float]:
    """Figures of one network."""
    of_imagenet = name.startswith(IMAGENET) and not name.endswith("_cifar")
    size = FLAGS.image_size or (224 if of_imagenet else 32)
    config = default()
    config.model.name, config.model.students = name, FLAGS.students
    config.train.batch_size = FLAGS.batch_size
    config = resolve(config)
    mesh, shape, classes = parallel.make_mesh(), (size, size, 3), 1000 if of_imagenet else 100
    started = time.perf_counter()
    describe(config, shape, classes)
    method, ensemble = make_method(config), make_ensemble(config, classes)
    optimizer = make_optimizer(config, method, steps=1_000_000)
    state = init_state(ensemble, method, optimizer, 0, shape)
    built = time.perf_counter() - started

    images = np.zeros((FLAGS.batch_size, *shape), np.uint8)
    examples = Pixels(images, np.zeros(len(images), np.int32), "zeros")
    facts = Facts("zeros", shape, tuple(map(str, range(classes))), len(images), 0, len(images))
    feed = Resident(config, Data(facts, examples, None, examples, Reader(shape)), mesh, "replicated")
    sums = zero_metrics(ensemble, method, state, shape)
    placed = parallel.replicate(mesh, (state, sums))
    one = parallel.replicate(mesh, np.int32(1))
    program = make_train_steps(config, ensemble, method, optimizer, feed, classes, mesh, 1_000_000)
    started = time.perf_counter()
    lowered = program.lower(
        *placed, feed.shapes, one, {"teachers": [], "key": jax.random.key_data(jax.random.key(0))}
    )
    traced = time.perf_counter() - started
    started = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    return {
        "image": size,
        "build s": round(built, 1),
        "trace s": round(traced, 1),
        "compile s": round(time.perf_counter() - started, 1),
        "arguments MB": round(memory.argument_size_in_bytes / 1e6),
        "temporary MB": round(memory.temp_size_in_bytes / 1e6),
    }


def main(_: list[str]) -> None:
    """Measures every network."""
    if FLAGS.measure:
        print(json.dumps(measure(FLAGS.measure)))
        return
    unknown = [name for name in FLAGS.models if name not in models.MODELS]
    if unknown:
        raise UserError(f"--models: {unknown[0]} is unknown{nearest(unknown[0], models.MODELS)}")
    rows = []
    for name in FLAGS.models:
        sizes = [f"--{flag}={FLAGS[flag].value}" for flag in ("students", "batch_size", "image_size")]
        command = [sys.executable, __file__, f"--measure={name}", *sizes]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, check=True, text=True, timeout=FLAGS.limit
            )
        except subprocess.TimeoutExpired:
            print(f"{name}: given up after {FLAGS.limit} s", file=sys.stderr)
            continue
        rows.append({"model": name, **json.loads(done.stdout.splitlines()[-1])})
        print(" ".join(map(str, rows[-1].values())), file=sys.stderr, flush=True)
    print(table([list(row.values()) for row in rows], list(rows[0])))
    note = f"{FLAGS.students} students, batch {FLAGS.batch_size}, n = 1; {jax.devices()[0].device_kind}"
    print(note)
    if FLAGS.json:
        write_json(pathlib.Path(FLAGS.json), {"environment": environment(), "note": note, "rows": rows})


if __name__ == "__main__":
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
