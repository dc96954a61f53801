"""The fastest execution mode of the branches on the device at hand: measured once, and kept."""

import dataclasses
import json
import statistics
import time
from typing import Any

import jax
import numpy as np
from jax import lax

from ekd_jax.common import parallel
from ekd_jax.common.cache import Cache
from ekd_jax.config.build import Networks
from ekd_jax.config.resolve import to_dict
from ekd_jax.methods.base import TeacherOutputs
from ekd_jax.runs.state import TrainState
from ekd_jax.training.setup import Setup
from ekd_jax.training.step import make_step
from ekd_jax.version import __version__

ROUNDS = 3  # per execution mode; the median counts
ROUND_SECONDS = 0.1  # a round takes at least this long
MEASURED = Cache("execution")  # seconds per step of each mode


def choose_execution(
    setup: Setup, state: TrainState, before: str = "", measured: bool | None = None
) -> tuple[Networks, str]:
    """Choose how the branches run: as `train.execution` asks, or the fastest mode for "auto".

    Measurements are kept in the user's cache, by device, networks, method and batch. All processes of a run
    must call this, and get the same answer.

    Args:
        setup: of the run, with the execution mode that the configuration asks for.
        state: of the run; arrays or shapes.
        before: execution mode used before a resume; kept, because other modes round differently.
        measured: whether to measure for "auto"; None: unless the devices are CPUs, where separate execution is
            the fastest (docs/decisions.md).

    Returns:
        The networks with the mode that was chosen, and a line that says so; "" if nothing was chosen.
    """
    device, networks = setup.mesh.local_devices[0], setup.networks
    if measured is None:
        measured = device.platform != "cpu"
    modes = networks.ensemble.executions
    if setup.config.train.execution != "auto":
        return networks, ""
    if before or not measured or len(modes) == 1:
        return networks.with_execution(before or "separate"), ""
    key = _cache_key(setup, device)
    # Zeros if process 0 has no measurement yet: then all measure at the same time, and its figures count.
    seconds = parallel.from_main(np.array(_load_seconds(key, modes), np.float32))
    when = "measured before"
    if not seconds.all():
        when = "measured"
        found = [_seconds_per_step(setup, state, mode, device) for mode in modes]
        seconds = parallel.from_main(np.array(found, np.float32))
        if parallel.is_main() and np.isfinite(seconds).all():
            MEASURED.store(key, dict(zip(modes, seconds, strict=True)))
    best = int(seconds.argmin())
    times = list(zip(modes, seconds, strict=True))
    others = ", ".join(f"{mode} {1e3 * s:.3g}" for mode, s in times if mode != modes[best])
    said = (
        f"branches run {modes[best]} ({1e3 * seconds[best]:.3g} ms per step; {others}; {when} on "
        f"{device.device_kind})"
    )
    return networks.with_execution(modes[best]), said


def _cache_key(setup: Setup, device: jax.Device) -> str:
    """Return a text that two runs share if their steps take equally long."""
    config = to_dict(setup.config)
    knobs = ("batch_size", "accumulation_steps", "rematerialize", "dtype")
    train = {name: config["train"][name] for name in knobs}
    versions = [__version__, jax.__version__, device.device_kind, setup.mesh.size]
    data = [setup.networks.input_shape, setup.data.facts.num_classes]
    what = [*versions, *data, config["model"], config["method"], config["optimizer"]["name"], train]
    return json.dumps(what)


def _load_seconds(key: str, modes: list[str]) -> list[float]:
    """Return the seconds per step of each mode; zeros if they are not known."""
    found = MEASURED.load(key)
    if found is None or found.keys() != set(modes):
        return [0.0] * len(modes)
    return [float(found[mode]) for mode in modes]


def _seconds_per_step(setup: Setup, state: TrainState, mode: str, device: jax.Device) -> float:
    """Measure forward pass, backward pass and update on one device's share of a batch of zeros.

    Returns:
        Seconds; infinity if it fails on that device, for example for lack of memory.
    """
    networks, train = setup.networks, setup.config.train
    one_group = dataclasses.replace(networks.ensemble.mode, groups=1)  # one device's part
    ensemble = dataclasses.replace(networks.ensemble, execution=mode, mode=one_group)
    networks = dataclasses.replace(networks, ensemble=ensemble)
    step = make_step(networks, setup.optimizer, setup.steps, train.epochs, train.accumulation_steps)

    def steps(state: Any, number: Any, batch: Any) -> Any:
        """Take several steps in one dispatch, as in training."""
        return lax.fori_loop(0, number, lambda _, state: step(state, *batch)[0], state)

    try:
        zeros = jax.device_put((_zeros(state), _batch(setup)), device)
        number = lambda n: jax.device_put(np.int32(n), device)  # noqa: E731
        program = jax.jit(steps).lower(zeros[0], number(1), zeros[1]).compile()

        def seconds(n: int) -> float:
            began = time.perf_counter()
            jax.block_until_ready(program(zeros[0], number(n), zeros[1]))
            return (time.perf_counter() - began) / n

        seconds(1)  # the first call also loads the program
        often = max(1, round(ROUND_SECONDS / seconds(1)))
        return statistics.median(seconds(often) for _ in range(ROUNDS))
    except jax.errors.JaxRuntimeError:
        return float("inf")


def _batch(setup: Setup) -> tuple[Any, ...]:
    """Return images, labels, key and teachers' outputs, as `make_step`'s function takes them, all zero."""
    size = setup.config.train.batch_size // setup.mesh.size
    images: Any = np.zeros((size, *setup.networks.input_shape), np.float32)
    if setup.networks.method.separate_views:
        images = (images,) * len(setup.networks.ensemble.students)
    taught = tuple(
        TeacherOutputs(_zeros(given.logits, size), _zeros(given.maps, size), _zeros(given.method))
        for given in setup.taught
    )
    return images, np.zeros(size, np.int32), jax.random.key(0), taught


def _zeros(tree: Any, size: int = 0) -> Any:
    """Return zeros of the shapes in `tree`, with `size` examples instead of one if it is given."""
    return jax.tree.map(
        lambda leaf: np.zeros((size, *leaf.shape[1:]) if size else leaf.shape, leaf.dtype), tree
    )
