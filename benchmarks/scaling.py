"""Count what devices exchange in a training step, and predict how long a step takes on many chips.

    python benchmarks/scaling.py --models=resnet20,resnet110 --devices=2,4,8 --json=out.json
    python benchmarks/scaling.py --read=out.json --chips=tpu_v5e --override=hop=2e-6     # compile nothing

Measured: the training step is compiled for virtual CPU devices, each setting in its own process, and its
collectives are read from the optimized HLO: their number, bytes and purpose. A collective in a loop counts once
per iteration. The number of iterations is the loop's `known_trip_count`, or the constant in its condition; the
only loop that has neither is the loop over steps, which counts once. Then one step is run under the profiler,
and the collectives that the devices ran are counted. Neither number may depend on the number of devices.

Predicted: the step time is computing time plus the time of all collectives one after the other, without any
overlap. Computing time is the number of FLOPs over the chip's published FLOP/s times an assumed utilization, or
--step_seconds. An all-reduce of b bytes among n chips takes a latency plus 2 (n - 1) / n b / bandwidth. `CHIPS`
holds published numbers, with their sources; none of them was measured here.
"""

import collections
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import app, flags
from hlo import Instruction, Module, sizes
from program import Program, check_models, configuration, is_for_imagenet

from ekd_jax.common.errors import UserError, nearest
from ekd_jax.common.files import write_json
from ekd_jax.common.text import table
from ekd_jax.models.cost import count_parameters
from ekd_jax.runs.state import TrainState
from ekd_jax.runs.workdir import environment

FLAGS = flags.FLAGS
flags.DEFINE_list("models", ["resnet20", "resnet110", "resnet50"], "networks")
flags.DEFINE_list("batch_norms", ["global", "local"], "model.batch_norm")
flags.DEFINE_list("devices", ["2", "4", "8"], "numbers of virtual devices")
flags.DEFINE_integer("students", 5, "number of students")
flags.DEFINE_integer("fsdp", 1, "train.fsdp")
flags.DEFINE_integer("accumulate", 1, "train.accumulation_steps; the theory holds for 1")
flags.DEFINE_string("placement", "replicated", "data.placement: replicated or sharded")
flags.DEFINE_integer("image_size", 0, "pixels; 0: 224 for ImageNet networks, else 32")
flags.DEFINE_integer("device_batch", 2, "examples per virtual device; only the input depends on it")
flags.DEFINE_boolean("run", True, "also run a step and count its collectives")
flags.DEFINE_list("chips", ["tpu_v5p", "h100"], "chips of CHIPS to predict for")
flags.DEFINE_list("counts", ["8", "64", "1024"], "numbers of chips to predict for")
flags.DEFINE_list("override", [], "replaces published numbers of a chip: bandwidth=1e11,hop=2e-6")
flags.DEFINE_integer("chip_batch", 0, "examples per chip; 0: 64 at 224x224, else 128")
flags.DEFINE_integer("global_batch", 1024, "examples per step where the global batch is fixed")
flags.DEFINE_float(
    "utilization", 0, "share of the published FLOP/s that is reached; 0: 0.3 at 224x224, else 0.05"
)
flags.DEFINE_float(
    "step_seconds", 0, "measured step time of one chip with chip_batch examples, instead of FLOP/s"
)
flags.DEFINE_string("json", None, "file to write the results to")
flags.DEFINE_string("read", None, "file written by --json: predict from it and compile nothing")
flags.DEFINE_string("measure", None, "used by child processes: the arguments of `measure`")

# Flags that are the same for all settings.
SAME = ("students", "image_size", "device_batch", "fsdp", "accumulate", "placement", "run")
# Otherwise CPU devices may run independent collectives in different orders and wait for each other forever.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


# --- collectives of a compiled program -----------------------------------------------------------


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
        op: all-reduce, all-gather, reduce-scatter, collective-permute or all-to-all.
        arrays: the arrays that XLA combined in it: (name of the operation, bytes of the whole array) of each.
        times: how often it runs per step.
    """

    op: str
    arrays: tuple[tuple[str, int], ...]
    times: int


OPS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


def collectives_in(text: str) -> list[Collective]:
    """Return the collectives of a step, from the text of an HLO module (`compiled.as_text()`).

    All branches of a conditional count.

    Raises:
        ValueError: a loop of unknown length inside another one has collectives.
    """
    module, found = Module(text), []
    for running in module.running():
        own = running.instruction
        if not re.fullmatch(f"({OPS})(-start)?", own.op):
            continue
        if running.uncounted > 1:
            raise ValueError(f"{own.name}: a collective in a loop of unknown length inside another")
        arrays = _arrays(own, module.computations[running.computation])
        found.append(Collective(own.op.removesuffix("-start"), arrays, running.times))
    return found


def _arrays(own: Instruction, others: dict[str, Instruction]) -> tuple[tuple[str, int], ...]:
    """Return name and bytes of every array of a collective; `others` are the instructions beside it."""
    exchanged = sizes(own.shape)
    if own.op == "all-gather-start":  # its type is (operands, results)
        exchanged = exchanged[len(exchanged) // 2 :]
    elif own.op == "collective-permute-start":
        exchanged = exchanged[1:2]
    elif own.op == "reduce-scatter":
        exchanged = [size for operand in own.operands for size in sizes(others[operand].shape)]
    # Combined arrays with different names are named "prefix/(a:b:c)".
    combined = re.fullmatch(r"(.*?/|)\((.*:.*)\)", own.op_name)
    names = [combined[1] + part for part in combined[2].split(":")] if combined else [own.op_name]
    names = names if len(names) == len(exchanged) else [own.op_name] * len(exchanged)
    return tuple(zip(names, exchanged, strict=True))


# --- purposes ------------------------------------------------------------------------------------

PURPOSES = (
    "gradients",
    "batch norm forward",
    "batch norm backward",
    "running statistics",
    "metrics",
    "parameters",
    "input",
)


def purpose(op: str, name: str, batch_norm: str) -> str:
    """Return why an array is exchanged, one of PURPOSES, from the name of the operation that needs it."""
    backward = "transpose(" in name
    if re.search(r"(^|[/._])bn\d*/", name):
        if batch_norm == "local":
            return "gradients" if backward else "running statistics"
        return "batch norm backward" if backward else "batch norm forward"
    if backward:
        return "gradients"
    if "sharding_constraint" in name:
        return "parameters"
    return "metrics" if op == "all-reduce" and "gather" not in name else "input"


class Tally(NamedTuple):
    """The data that a step exchanges for one purpose.

    Attributes:
        arrays: number of arrays.
        bytes: bytes of these arrays.
        collectives: number of collectives that carry them; a collective with several purposes counts for the
            one with the most bytes.
    """

    arrays: int = 0
    bytes: int = 0
    collectives: int = 0


def tally(found: Sequence[Collective], batch_norm: str) -> dict[str, Tally]:
    """Return what is exchanged, by purpose."""
    total = dict.fromkeys(PURPOSES, Tally())
    for op, arrays, times in found:
        own: collections.Counter[str] = collections.Counter()
        for name, size in arrays:
            why = purpose(op, name, batch_norm)
            own[why] += size
            old = total[why]
            total[why] = old._replace(arrays=old.arrays + times, bytes=old.bytes + times * size)
        why = own.most_common(1)[0][0]
        total[why] = total[why]._replace(collectives=total[why].collectives + times)
    return {why: own for why, own in total.items() if own.arrays}


def theory(state: TrainState, batch_norm: str) -> dict[str, Tally]:
    """Return what must be exchanged, by purpose, without metrics.

    With global batch norm, a layer of C channels exchanges mean and mean of squares (2 C floats) in the forward
    pass, and in the backward pass the two sums that are also the gradients of its scale and bias: two
    all-reduces. With local batch norm, its running values move towards the mean over the devices (2 C floats),
    and nothing waits for them. Gradients are exchanged once for everything outside of loops and once per block
    of a scanned stage. So are local running values, outside of loops together with the gradients.
    """

    def leaves(tree: Any) -> list[tuple[list[str], tuple[int, ...]]]:
        found = jax.tree.leaves_with_path(tree)
        return [([str(getattr(key, "key", key)) for key in path], leaf.shape) for path, leaf in found]

    means = [shape for path, shape in leaves(state.batch_stats) if path[-1] == "mean"]
    layers = sum(math.prod(shape[:-1]) for shape in means)
    sizes = 2 * layers, 8 * sum(map(math.prod, means))
    scanned = {
        tuple(path[: path.index("rest")]): shape[0]
        for path, shape in leaves(state.params)
        if "rest" in path
    }
    blocks, parameters = sum(scanned.values()), 4 * count_parameters(state.params)
    if batch_norm == "local":
        return {
            "gradients": Tally(bytes=parameters, collectives=1 + blocks),
            "running statistics": Tally(*sizes, blocks),
        }
    return {
        "gradients": Tally(bytes=parameters - sizes[1], collectives=1 + blocks),
        "batch norm forward": Tally(*sizes, layers),
        "batch norm backward": Tally(*sizes, layers),
    }


# --- measuring -----------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One measurement: a network, its batch norm, the number of devices, and the flags of these names."""

    model: str
    batch_norm: str
    devices: int
    students: int = 5
    image_size: int = 0
    device_batch: int = 2
    fsdp: int = 1
    accumulate: int = 1
    placement: str = "replicated"
    run: bool = True


def measure(setting: Setting) -> dict[str, Any]:
    """Return the row of one setting."""
    large = is_for_imagenet(setting.model)
    knobs = {
        "model__batch_norm": setting.batch_norm,
        "train__fsdp": setting.fsdp,
        "train__accumulation_steps": setting.accumulate,
    }
    batch_size = setting.device_batch * setting.devices
    config = configuration(setting.model, setting.students, batch_size, **knobs)
    size, classes = setting.image_size or (224 if large else 32), 1000 if large else 100
    program = Program(config, size, classes, devices=setting.devices, placement=setting.placement)
    compiled = program.lower().compile()
    found = collectives_in(compiled.as_text())
    row = {
        "model": setting.model,
        "batch_norm": setting.batch_norm,
        "devices": setting.devices,
        "students": setting.students,
        "image_size": size,
        "parameters": count_parameters(program.state.params),
        "macs": program.setup.networks.trace.total_cost().macs,
        "found": tally(found, setting.batch_norm),
        "theory": theory(program.state, setting.batch_norm),
        "collectives": sum(times for _, _, times in found),
        "in_loops": sum(times for _, _, times in found if times > 1),
        "run": None,
        "environment": environment(),
    }
    if setting.run:
        print(json.dumps(row), flush=True)  # in case running it fails
        row["run"] = _run(compiled, program.arguments()) / setting.devices
    return row


def _run(compiled: Any, arguments: Any) -> int:
    """Return the number of collectives that all devices together run in a step."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(*arguments))
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = [event.name for plane in planes for line in plane.lines for event in line.events]
    return sum(re.match(f"({OPS})", name) is not None for name in events)


def measure_all() -> list[dict[str, Any]]:
    """Measure every setting in its own process and return the rows."""
    check_models(FLAGS.models)
    same = {flag: FLAGS[flag].value for flag in SAME}
    rows = []
    for setting in itertools.product(FLAGS.models, FLAGS.batch_norms, FLAGS.devices):
        model, batch_norm, devices = setting
        xla_flags = os.environ.get("XLA_FLAGS", "")
        xla_flags += f" {IN_ORDER} --xla_force_host_platform_device_count={devices}"
        arguments = {"model": model, "batch_norm": batch_norm, "devices": int(devices), **same}
        done = subprocess.run(
            [sys.executable, __file__, f"--measure={json.dumps(arguments)}"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags},
        )
        if not done.stdout:
            raise UserError(f"{' '.join(setting)}: failed, see above")
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(_from_json(row))
        print(*setting, row["collectives"], "collectives, run:", row["run"], file=sys.stderr, flush=True)
        if FLAGS.json:
            write_json(pathlib.Path(FLAGS.json), {"rows": rows})
    return rows


def _from_json(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its tallies as records, as before it was written as JSON."""
    own = {which: {why: Tally(*t) for why, t in row[which].items()} for which in ("found", "theory")}
    return {**row, **own}


def exchange_tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return tables of what is exchanged; numbers of devices with the same results share a row."""
    same: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        figures = [row[name] for name in ("model", "batch_norm", "found", "collectives")]
        same.setdefault(json.dumps(figures), []).append(row)
    lines, whole = [], []
    for alike in same.values():
        row = alike[0]
        setting = [row["model"], row["batch_norm"], " ".join(str(r["devices"]) for r in alike)]
        for why, own in row["found"].items():
            should = row["theory"].get(why, Tally())
            figures = [f"{a:,} ({b:,})" if b else f"{a:,}" for a, b in zip(own, should, strict=True)]
            lines.append([*setting, why, *figures])
        in_all = [sum(own[i] for own in row["found"].values()) for i in (0, 1)]
        ran = " ".join(sorted({f"{r['run']:,g}" for r in alike if r["run"] is not None})) or "-"
        counts = [row["in_loops"], *in_all, row["parameters"]]
        whole.append([*setting, f"{row['collectives']:,}", ran, *(f"{n:,}" for n in counts)])
    named = ["model", "batch norm", "devices"]
    first = table(lines, [*named, "for", "arrays", "bytes", "collectives"])
    second = table(whole, [*named, "collectives", "run", "in loops", "arrays", "bytes", "parameters"])
    return f"{first}\nin brackets: the theory\n\n{second}\n{_verdict(rows, len(same))}"


def _verdict(rows: Sequence[dict[str, Any]], kinds: int) -> str:
    """Return in words whether results depend on the number of devices and agree with the profiler."""
    settings = {(row["model"], row["batch_norm"]) for row in rows}
    ran = [row for row in rows if row["run"] is not None]
    return (
        f"{'the SAME' if kinds == len(settings) else 'NOT the same'} for all numbers of devices; "
        f"{sum(row['run'] == row['collectives'] for row in ran)} of {len(rows)} settings were run and ran "
        f"as many collectives as the HLO has"
    )


# --- predicting ----------------------------------------------------------------------------------


class Chip(NamedTuple):
    """Published numbers of a chip and its links, in FLOP/s, bytes/s and seconds.

    Attributes:
        flops: dense bfloat16 FLOP/s.
        group: number of chips that the fast links join: a TPU pod, a GPU node.
        bandwidth: from one chip to the others of its group, one way.
        between: from a whole group to other groups, one way.
        axes: number of axes of the group's torus; 0: no torus, a small message goes from chip to chip.
        base: latency of any collective.
        hop: latency from chip to chip.
        far_hop: latency from group to group.
    """

    flops: float
    group: int
    bandwidth: float
    between: float
    axes: int
    base: float
    hop: float
    far_hop: float


# Published, not measured. TPUs: FLOP/s, pods and bandwidths as in https://docs.cloud.google.com/tpu/docs/v4,
# v5e, v5p and v6e. One way out of a chip is the "all-reduce bandwidth per pod" over its chips (v4: 1.1 PB/s
# over 4,096; v5e: 51.2 TB/s over 256; v6e: 102.4 TB/s over 256), for v5p half of the 1,200 GB/s both ways;
# between pods it is the "data center network bandwidth per pod" (v5e: 6.4 Tb/s, v6e: 25.6 Tb/s; v5p: 50
# Gb/s a chip; v4: 25 GB/s a host of 4 chips, https://jax-ml.github.io/scaling-book/tpus). About 1 us a hop:
# https://jax-ml.github.io/scaling-book/sharding, "a note on ICI latency" (3 hops took 8 us there).
# H100: 990 TFLOP/s, 450 GB/s one way (NVLink, 900 both ways), 400 GB/s out of a node of 8 (InfiniBand NDR,
# 400 Gb/s a GPU): https://jax-ml.github.io/scaling-book/gpus. Its latencies are those by which NCCL chooses
# (tree, LL): https://github.com/NVIDIA/nccl/blob/b6475625fbcaa2c3c0e50eed2fa1255d7514d4a2/src/graph/tuning.cc
# ASSUMED, without a source: 20 us from pod to pod.
CHIPS = {
    "tpu_v4": Chip(275e12, 4096, 270e9, 25.6e12, 3, 0, 1e-6, 20e-6),
    "tpu_v5e": Chip(197e12, 256, 200e9, 800e9, 2, 0, 1e-6, 20e-6),
    "tpu_v5p": Chip(459e12, 8960, 600e9, 56e12, 3, 0, 1e-6, 20e-6),
    "tpu_v6e": Chip(918e12, 256, 400e9, 3200e9, 2, 0, 1e-6, 20e-6),
    "h100": Chip(990e12, 8, 450e9, 400e9, 0, 6.8e-6, 0.6e-6, 5e-6),
}


def latency(chip: Chip, n: int) -> float:
    """Return the seconds of the smallest all-reduce among n chips.

    It travels there and back over half of each axis of a torus that is as square as possible, or along the
    chips of a node and up a tree of nodes.
    """
    near, far = min(n, chip.group), max(1, n / chip.group)
    hops = chip.axes * near ** (1 / chip.axes) / 2 if chip.axes else near - 1
    return chip.base + 2 * (hops * chip.hop + math.log2(far) * chip.far_hop)


def transfer(chip: Chip, n: int, size: float) -> float:
    """Return the seconds of an all-reduce's bytes: round a ring in each group, then between groups."""
    near, far = min(n, chip.group), max(1, n / chip.group)
    seconds = 2 * (near - 1) / near * size / chip.bandwidth
    return seconds + (2 * (far - 1) / far * size / chip.between if far > 1 else 0)


class Prediction(NamedTuple):
    """The seconds of a step, by purpose."""

    computing: float
    gradients: float
    batch_norm: float
    other: float


def predict(found: dict[str, Tally], chip: Chip, n: int, computing: float) -> Prediction:
    """Return the predicted step on n chips, each of which computes for `computing` seconds."""
    spent: collections.Counter[str] = collections.Counter()
    exchanges = found.items() if n > 1 else []
    for why, own in exchanges:
        half = 0.5 if why == "parameters" else 1  # a gather is half an all-reduce
        kind = why if why == "gradients" else "batch norm" if "batch norm" in why else "other"
        spent[kind] += half * (own.collectives * latency(chip, n) + transfer(chip, n, own.bytes))
    return Prediction(computing, spent["gradients"], spent["batch norm"], spent["other"])


def prediction_tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return tables of predictions, one per chip."""
    unknown = [name for name in FLAGS.chips if name not in CHIPS]
    if unknown:
        raise UserError(f"--chips: {unknown[0]} is unknown{nearest(unknown[0], CHIPS)}")
    settings = {(row["model"], row["batch_norm"]): row for row in rows}.values()
    header = ["model", "batch norm", "batch", "chips", "per chip"]
    header += ["computing", "gradients", "batch norms", "other", "step", "efficiency %"]
    parts = []
    for name in FLAGS.chips:
        given = dict(pair.split("=") for pair in FLAGS.override)
        chip = CHIPS[name]._replace(**{field: float(value) for field, value in given.items()})
        lines = []
        for row, fixed, chips in itertools.product(settings, ("per chip", "global"), FLAGS.counts):
            n, of_chip = int(chips), FLAGS.chip_batch or (64 if _is_large(row) else 128)
            examples = of_chip if fixed == "per chip" else FLAGS.global_batch / n
            each = FLAGS.step_seconds / of_chip or _seconds_per_example(row, chip)
            step = predict(row["found"], chip, n, each * examples)
            efficiency = 100 * each * examples / sum(step)
            times = [f"{1e3 * seconds:.2f}" for seconds in (*step, sum(step))]
            setting = [row["model"], row["batch_norm"], f"fixed {fixed}", n, f"{examples:g}"]
            lines.append([*setting, *times, f"{efficiency:.0f}"])
        published = ", ".join(f"{field} {value:g}" for field, value in chip._asdict().items())
        parts.append(
            f"PREDICTED for {name}, not measured ({published}); milliseconds\n{table(lines, header)}"
        )
    return "\n\n".join(parts)


def _seconds_per_example(row: dict[str, Any], chip: Chip) -> float:
    """Return the predicted computing time of an example; the backward pass counts as two forward passes."""
    utilization = FLAGS.utilization or (0.3 if _is_large(row) else 0.05)
    return 6 * row["macs"] / (chip.flops * utilization)  # a multiply-add is 2 FLOPs


def _is_large(row: dict[str, Any]) -> bool:
    large: bool = row["image_size"] >= 224
    return large


def main(_: list[str]) -> None:
    """Measure every setting, predict from it and print tables."""
    if FLAGS.measure:
        print(json.dumps(measure(Setting(**json.loads(FLAGS.measure)))))
        return
    if FLAGS.read:
        rows = [_from_json(row) for row in json.loads(pathlib.Path(FLAGS.read).read_text())["rows"]]
    else:
        rows = measure_all()
    print(f"{exchange_tables(rows)}\n\n{prediction_tables(rows)}")


if __name__ == "__main__":
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
