"""Which way to run the branches is the fastest on the device at hand: measured once, and kept."""

import dataclasses
import hashlib
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
from jax import lax

from ekd_jax.common import parallel
from ekd_jax.common.files import user_cache, write_json
from ekd_jax.config.resolve import to_dict
from ekd_jax.methods.base import TeacherOutputs
from ekd_jax.models.ensemble import Ensemble
from ekd_jax.runs.state import TrainState
from ekd_jax.training.setup import Job
from ekd_jax.training.step import make_step
from ekd_jax.version import __version__

ROUNDS = 3  # of each way, the median counts
ROUND_SECONDS = 0.1  # a round takes at least this long


def choose_execution(
    job: Job, state: TrainState, before: str = "", measured: bool | None = None
) -> tuple[Ensemble, str]:
    """The ensemble with its branches run in the way that `train.execution` asks for, or, for "auto", in
    the fastest way that it has.

    What was measured is kept in the user's cache, for the device, the networks, the method and the batch.
    All processes of a run must call this, and get the same.

    Args:
        job: what is trained, with the ensemble as `config.make_ensemble` gives it.
        state: of it; arrays or shapes.
        before: the way that a run went which goes on: it keeps to it, as another one rounds differently.
        measured: whether to measure for "auto", or to leave the branches as they are; None: unless the
            devices are CPUs, where one by one is the fastest (docs/decisions.md).

    Returns:
        The ensemble, and a line that says what was chosen; "" if nothing was.
    """
    device = job.mesh.local_devices[0]
    if measured is None:
        measured = device.platform != "cpu"
    ways = job.ensemble.executions
    if job.config.train.execution != "auto":
        return job.ensemble, ""
    if before or not measured or len(ways) == 1:
        return dataclasses.replace(job.ensemble, execution=before or "separate"), ""
    kept = user_cache() / f"execution-{_name(job, device)}.json"
    # Zeros if process 0 knows nothing yet: then all measure at the same time, and its figures count.
    seconds = parallel.from_main(np.array(_recall(kept, ways), np.float32))
    when = "measured before"
    if not seconds.all():
        when = "measured"
        found = [_seconds_of_a_step(job, state, way, device) for way in ways]
        seconds = parallel.from_main(np.array(found, np.float32))
        if parallel.is_main() and np.isfinite(seconds).all():
            _keep(kept, {way: float(value) for way, value in zip(ways, seconds, strict=True)})
    best = int(seconds.argmin())
    others = [f"{way} {1e3 * s:.3g}" for way, s in zip(ways, seconds, strict=True) if way != ways[best]]
    said = (
        f"branches run {ways[best]} ({1e3 * seconds[best]:.3g} ms a step; {', '.join(others)}; {when} on "
        f"{device.device_kind})"
    )
    return dataclasses.replace(job.ensemble, execution=ways[best]), said


def _name(job: Job, device: jax.Device) -> str:
    """Two runs share it if a step of theirs takes as long."""
    config = to_dict(job.config)
    train = {
        name: config["train"][name]
        for name in ("batch_size", "accumulation_steps", "rematerialize", "dtype")
    }
    versions = [__version__, jax.__version__, device.device_kind, job.mesh.size]
    data = [job.input_shape, job.data.facts.num_classes]
    what = [*versions, *data, config["model"], config["method"], config["optimizer"]["name"], train]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]


def _recall(path: pathlib.Path, ways: list[str]) -> list[float]:
    """Seconds of a step in each way; zeros if they are not known."""
    try:
        kept = json.loads(path.read_text())
        seconds = [float(kept[way]) for way in ways]
    except (OSError, ValueError, KeyError, TypeError):
        return [0.0] * len(ways)
    return seconds if min(seconds) > 0 and np.isfinite(seconds).all() else [0.0] * len(ways)


def _keep(path: pathlib.Path, seconds: dict[str, float]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, seconds)
    except OSError:
        pass  # it can be measured again


def _seconds_of_a_step(job: Job, state: TrainState, way: str, device: jax.Device) -> float:
    """Of one device's share of a batch of zeros, forward, backward and update, on one device; infinity if
    it fails there, for example for want of memory."""
    mode = dataclasses.replace(job.ensemble.mode, groups=1)  # one device's part
    ensemble = dataclasses.replace(job.ensemble, execution=way, mode=mode)
    train = job.config.train
    step = make_step(ensemble, job.method, job.optimizer, job.steps, train.epochs, train.accumulation_steps)

    def steps(state: Any, number: Any, batch: Any) -> Any:
        """In one dispatch, as they are when training."""
        return lax.fori_loop(0, number, lambda _, state: step(state, *batch)[0], state)

    try:
        zeros = jax.device_put((_zeros(state), _batch(job)), device)
        number = lambda n: jax.device_put(np.int32(n), device)  # noqa: E731
        program = jax.jit(steps).lower(zeros[0], number(1), zeros[1]).compile()

        def seconds(n: int) -> float:
            began = time.perf_counter()
            jax.block_until_ready(program(zeros[0], number(n), zeros[1]))
            return (time.perf_counter() - began) / n

        seconds(1)  # the first also loads the program
        often = max(1, round(ROUND_SECONDS / seconds(1)))
        return statistics.median(seconds(often) for _ in range(ROUNDS))
    except jax.errors.JaxRuntimeError:
        return float("inf")


def _batch(job: Job) -> tuple[Any, ...]:
    """Images, labels, key and what teachers say, as `make_step`'s function takes them, all zero."""
    size = job.config.train.batch_size // job.mesh.size
    images: Any = np.zeros((size, *job.input_shape), np.float32)
    if job.method.separate_views:
        images = (images,) * len(job.ensemble.students)
    taught = tuple(
        TeacherOutputs(_zeros(given.logits, size), _zeros(given.maps, size), _zeros(given.method))
        for given in job.taught
    )
    return images, np.zeros(size, np.int32), jax.random.key(0), taught


def _zeros(tree: Any, size: int = 0) -> Any:
    """Like `tree`; with `size` of so many examples instead of one."""
    return jax.tree.map(
        lambda leaf: np.zeros((size, *leaf.shape[1:]) if size else leaf.shape, leaf.dtype), tree
    )
