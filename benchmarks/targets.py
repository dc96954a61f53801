"""Compile the training step for accelerators that are not there, and count what it launches and moves.

    python benchmarks/targets.py --targets=h100,v6e --models=resnet20 --students=1,5 --executions=separate,packed
    python benchmarks/targets.py --targets=v5e --chips=1,256 --batch_norms=global,local --json=out.json

XLA compiles for a described device: for GPUs that needs JAX 0.12 on Python 3.12, for TPUs any version:

    python3.12 -m venv targets && targets/bin/pip install "jax[cuda12]==0.12.0.1" libtpu -e .      # about 5 GB

Nothing is allocated and nothing runs, so the program tells what would be launched and moved, not how long it takes.
Each setting is compiled in a process of its own. What is printed:

* kernels: instructions of one step that a GPU launches, by part. A fusion counts for the part of its last operation;
  a cuDNN convolution counts once, whatever it launches inside. On a TPU they are operations of one program.
* bytes: what these kernels read and write, each operand and result once. Of an operand that a fusion only takes a slice
  of, the slice counts. Caches are not thought of.
* FLOPs: of convolutions and matrix products, before XLA optimizes them.
* memory: arguments and temporary arrays, as XLA plans them; code: of the compiled program.
* collectives, and their bytes, of one step.
* bound: no step takes less than launches x LAUNCH, bytes / bandwidth, or FLOPs / peak. The numbers are in `TARGETS`.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"  # nothing to tune on
)
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

import jax
import numpy as np
from absl import app, flags
from hlo import flops as program_flops
from jax.experimental import topologies
from kernels import tally
from program import check_models, configuration, is_for_imagenet, random_images, with_data_of

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError, nearest, reason
from ekd_jax.common.files import write_json
from ekd_jax.common.text import table
from ekd_jax.data.resident import gather_batch
from ekd_jax.methods import METHODS
from ekd_jax.models.platform import tracing_for
from ekd_jax.runs.state import init_state
from ekd_jax.runs.workdir import environment
from ekd_jax.training.setup import Setup, prepare
from ekd_jax.training.step import make_train_steps, zero_tally
from ekd_jax.training.teaching import make_teach

LAUNCH = 2.5e-6  # ASSUMED seconds between kernels of a stream; 2 to 5 are usual, less in a CUDA graph


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
        platform: "gpu" or "tpu".
        topologies: XLA's name of the topology, by number of chips.
        flops: published peak of dense bfloat16 products per second.
        bandwidth: published bytes per second of its memory.
    """

    platform: str
    topologies: dict[int, str]
    flops: float
    bandwidth: float


TORUS_2D = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
TORUS_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
# Sources: NVIDIA's data sheet of the H100 SXM; Google's pages of the TPU versions.
TARGETS = {
    "h100": Target("gpu", {1: "1x1x1", 2: "1x1x2", 4: "1x1x4", 8: "1x1x8"}, 989e12, 3.35e12),
    "v5e": Target("tpu", {n: f"v5e:{shape}" for n, shape in TORUS_2D.items()}, 197e12, 819e9),
    "v6e": Target("tpu", {n: f"v6e:{shape}" for n, shape in TORUS_2D.items()}, 918e12, 1640e9),
    "v5p": Target("tpu", {n: f"v5p:{shape}" for n, shape in TORUS_3D.items()}, 459e12, 2765e9),
}

FLAGS = flags.FLAGS
flags.DEFINE_list("targets", ["h100"], f"devices to compile for: {', '.join(TARGETS)}")
flags.DEFINE_list("chips", ["1"], "numbers of chips")
flags.DEFINE_list("models", ["resnet20"], "networks")
flags.DEFINE_list("students", ["5"], "numbers of students")
flags.DEFINE_list("methods", ["oem"], "training methods that need no teacher")
flags.DEFINE_list("executions", ["separate"], "train.execution: separate, stacked, packed")
flags.DEFINE_list("dtypes", ["bfloat16"], "train.dtype")
flags.DEFINE_list("batch_norms", ["global"], "model.batch_norm: global, local")
flags.DEFINE_integer("batch_size", 0, "examples per chip; 0: 32 at 224x224, else 128")
flags.DEFINE_list("knobs", [], "other knobs: train.rematerialize=True, ...")
flags.DEFINE_string("hlo", None, "directory to write the programs to")
flags.DEFINE_integer("limit", 1800, "seconds after which a setting is given up")
flags.DEFINE_string("json", None, "file to write the results to")
flags.DEFINE_string("measure", None, "used by child processes: a setting")


# --- compiling -----------------------------------------------------------------------------------


class Described:
    """A training set of one batch on devices that are not there.

    Args:
        setup: of the run.
    """

    def __init__(self, setup: Setup):
        self._mesh, self._batch_size = setup.mesh, setup.config.train.batch_size
        place = parallel.replicated(self._mesh)
        shape, size = setup.data.facts.input_shape, self._batch_size

        def described(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        self.shapes = (
            described((size, *shape), np.uint8),
            described((size,), np.int32),
            described((2 * size,), np.int32),
            described((), np.int32),
        )

    def select_batch(self, loaded: Any, i: Any) -> Any:
        """Gather a batch as a set in device memory does."""
        return gather_batch(self._mesh, self._batch_size, loaded, i)


def topology_mesh(target: str, chips: int, fsdp: int) -> Any:
    """Return a mesh of devices that are not there.

    Raises:
        UserError: there is no such number of chips, or this version of JAX cannot compile for them.
    """
    known = TARGETS[target]
    size = next((n for n in known.topologies if n >= chips), None)
    if size is None:
        raise UserError(f"--chips={chips}: at most {max(known.topologies)} of {target}")
    try:
        if known.platform == "gpu":
            described = (pathlib.Path(__file__).parent / f"{target}.txtpb").read_text()
            found = topologies.get_topology_desc(
                platform="cuda", target_config=described, topology=known.topologies[size]
            )
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=known.topologies[size])
    except Exception as error:  # many kinds, by what is missing
        raise UserError(
            f"--targets={target}: this installation cannot compile for it: {reason(error)}"
        ) from error
    return parallel.make_mesh(found.devices[:chips], fsdp)


def lower(config: Any, target: str, chips: int) -> Any:
    """Trace the training program of a configuration for a target; returns what JAX's `lower` returns."""
    large = is_for_imagenet(config.model.name)
    mesh = topology_mesh(target, chips, config.train.fsdp)
    source = random_images(config.train.batch_size, 224 if large else 32, 1000 if large else 100)
    with tracing_for(TARGETS[target].platform):
        setup = prepare(with_data_of(config, source), mesh, source=source)
        state = init_state(setup.networks, setup.optimizer, seed=0)
        shardings = parallel.state_shardings(mesh, state)
        copied = parallel.replicated(mesh)

        def described(tree: Any, places: Any) -> Any:
            return jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=place),
                tree,
                places,
            )

        def everywhere(tree: Any) -> Any:
            return described(tree, jax.tree.map(lambda _: copied, tree))

        key = np.asarray(jax.random.key_data(jax.random.key(0)))
        feed = Described(setup)
        teach = make_teach([], setup.config.data)
        return make_train_steps(setup, feed, teach, shardings).lower(  # type: ignore[arg-type]
            described(state, shardings),
            everywhere(zero_tally(setup, state)),
            feed.shapes,
            everywhere(np.int32(1)),
            everywhere({"teachers": [], "key": key}),
        )


def measure(setting: dict[str, Any]) -> dict[str, Any]:
    """Compile a setting and return its row."""
    target, chips, model = setting["target"], setting["chips"], setting["model"]
    per_chip = setting["batch_size"] or (32 if is_for_imagenet(model) else 128)
    knobs = {
        "train__dtype": setting["dtype"],
        "train__execution": setting["execution"],
        "model__batch_norm": setting["batch_norm"],
        **setting["knobs"],
    }
    config = configuration(model, setting["students"], per_chip * chips, setting["method"], **knobs)
    started = time.perf_counter()
    lowered = lower(config, target, chips)
    traced = time.perf_counter() - started
    flops = program_flops(lowered.as_text(dialect="hlo")) / chips
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if setting["hlo"]:
        path = pathlib.Path(setting["hlo"])
        path.mkdir(parents=True, exist_ok=True)
        names = [
            str(setting[name]) for name in ("target", "chips", "model", "students", "method", "execution")
        ]
        (path / f"{'_'.join(names)}.hlo.txt").write_text(text)
    found = tally(text)
    known = TARGETS[target]
    analysis: Any = compiled.cost_analysis() or {}
    bounds = {
        "launches": LAUNCH * found["kernels"] if known.platform == "gpu" else 0.0,
        "memory": found["bytes"] / known.bandwidth,
        "arithmetic": flops / known.flops,
    }
    return {
        **{name: value for name, value in setting.items() if name != "hlo"},
        "batch_size": per_chip * chips,
        **found,
        "flops": flops,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "estimated_seconds": analysis.get("optimal_seconds"),
        "bounds": bounds,
        "trace_seconds": round(traced, 1),
        "compile_seconds": round(seconds, 1),
    }


# --- tables --------------------------------------------------------------------------------------


def as_text(rows: list[dict[str, Any]]) -> str:
    """Return the results as two tables: settings, and the parts of each."""
    header = [
        "target",
        "chips",
        "network",
        "method",
        "branches",
        "kernels",
        "MB moved",
        "GFLOP",
        "MB temporary",
    ]
    header += ["MB code", "collectives", "MB exchanged", "ms at least", "by", "compile s"]
    lines = []
    for row in rows:
        by = max(row["bounds"], key=row["bounds"].__getitem__)
        lines.append([
            row["target"], row["chips"], f"{row['model']} x {row['students']}", row["method"], row["execution"],
            f"{row['kernels']:,}", f"{row['bytes'] / 1e6:,.0f}", f"{row['flops'] / 1e9:,.0f}",
            f"{row['temporary_bytes'] / 1e6:,.0f}", f"{row['code_bytes'] / 1e6:,.0f}", row["collectives"],
            f"{row['collective_bytes'] / 1e6:,.1f}", f"{1e3 * row['bounds'][by]:.2f}", by, row["compile_seconds"],
        ])  # fmt: skip
    parts = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    own = [
        [
            f"{row['target']} {row['model']} x {row['students']} {row['method']} {row['execution']}",
            *(f"{row['parts'][name][0]:,}" if name in row["parts"] else "" for name in parts),
        ]
        for row in rows
    ]
    return f"{table(lines, header)}\n\nkernels by part\n{table(own, ['', *parts])}"


def _settings() -> Iterator[dict[str, Any]]:
    knobs = {}
    for pair in FLAGS.knobs:
        name, _, value = pair.partition("=")
        knobs[name.replace(".", "__")] = json.loads(value.lower() if value in ("True", "False") else value)
    for target, chips, model, students, method, execution, dtype, batch_norm in itertools.product(
        FLAGS.targets, map(int, FLAGS.chips), FLAGS.models, map(int, FLAGS.students),
        FLAGS.methods, FLAGS.executions, FLAGS.dtypes, FLAGS.batch_norms,
    ):  # fmt: skip
        if students == 1 and execution != FLAGS.executions[0]:
            continue  # one branch runs in one way
        yield {
            "target": target, "chips": chips, "model": model, "students": students, "method": method,
            "execution": execution, "dtype": dtype, "batch_norm": batch_norm, "batch_size": FLAGS.batch_size,
            "knobs": knobs, "hlo": FLAGS.hlo,
        }  # fmt: skip


def main(argv: list[str]) -> None:
    """Compile all settings and print the tables."""
    if FLAGS.measure:
        print(json.dumps(measure(json.loads(FLAGS.measure))))
        return
    check_models(FLAGS.models)
    for flag, known in (("targets", TARGETS), ("methods", METHODS)):
        for name in FLAGS[flag].value:
            if name not in known:
                raise UserError(f"--{flag}: {name} is unknown{nearest(name, known)}")
    rows, failed = [], []
    for setting in _settings():
        command = [sys.executable, __file__, f"--measure={json.dumps(setting)}"]
        about = " ".join(
            str(setting[name]) for name in ("target", "model", "students", "method", "execution")
        )
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=FLAGS.limit)
        except subprocess.TimeoutExpired:
            failed.append(f"{about}: given up after {FLAGS.limit} s")
            continue
        if done.returncode:
            failed.append(f"{about}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
            print(failed[-1], file=sys.stderr, flush=True)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{about}: {rows[-1]['kernels']:,} kernels", file=sys.stderr, flush=True)
    if rows:
        print(as_text(rows))
    print(f"jax {jax.__version__}; {LAUNCH * 1e6:g} us a launch is assumed")
    if FLAGS.json:
        content = {"environment": environment(), "rows": rows, "failed": failed}
        write_json(pathlib.Path(FLAGS.json), content)
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
