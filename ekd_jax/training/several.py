"""Train several runs: one after the other, or side by side, each on its share of the devices."""

import contextlib
import contextvars
import gc
import signal
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import jax
from jax.sharding import Mesh

from ekd_jax.common import log, parallel
from ekd_jax.common.errors import Interrupted, UserError, about
from ekd_jax.common.log import logger
from ekd_jax.common.text import clock
from ekd_jax.data.dataset import Source
from ekd_jax.runs.history import Permit
from ekd_jax.training import plans
from ekd_jax.training.comparison import Entry
from ekd_jax.training.interrupt import POLL_SECONDS, Interrupt

Train = Callable[[Entry, Mesh | None], object]


def train_all(
    runs: Sequence[Entry],
    mesh: Mesh | None = None,
    source: Source | None = None,
    permit: Permit | None = None,
    at_once: int = 1,
) -> None:
    """Train the runs that are not complete. For the other arguments see `single.run`.

    Args:
        runs: what a run needs comes before it.
        at_once: how many are trained at a time, each on as many of the devices. The bits of a run are those that it
            has alone on so many devices.

    Raises:
        UserError: as `single.run`; the devices cannot be divided so; a tracker. Runs that trained then were saved.
        Interrupted: SIGINT or SIGTERM came; checkpoints were saved.
    """
    shares = parallel.shares(at_once, mesh)
    if tracked := {run.config.train.tracker for run in runs if run.config.train.tracker and at_once > 1}:
        raise UserError(
            f"at_once={at_once}: train.tracker={tracked.pop()} follows one run at a time: leave one out"
        )
    open_runs = []
    for run in runs:
        if permit or not run.complete:
            open_runs.append(run)
            continue
        with about(_name(run)):
            run.check()

    def train(run: Entry, own: Mesh | None) -> None:
        left = seconds_left(runs) / at_once
        said = f", about {clock(left)} left" if left else ""
        logger.info(f"run {runs.index(run) + 1} of {len(runs)}: {_name(run)}{said}")
        with about(_name(run)), log.about(_name(run)) if at_once > 1 else contextlib.nullcontext():
            plans.run(run.config, run.path, own, source, permit)
        gc.collect()  # compiled programs are part of reference cycles

    if at_once > 1:
        _side_by_side(open_runs, shares, train)
        return
    for run in open_runs:
        train(run, mesh)


def _name(run: Entry) -> str:
    return f"{run.label}, seed {run.config.seed}"


def _side_by_side(runs: Sequence[Entry], shares: Sequence[Sequence[jax.Device]], train: Train) -> None:
    """Train runs in threads. When one fails, the others are saved and end, too."""

    def work(run: Entry, devices: Sequence[jax.Device]) -> None:
        train(run, parallel.make_mesh(devices, run.config.train.fsdp))

    waiting, free = list(runs), list(shares)
    training: dict[Future[None], Sequence[jax.Device]] = {}
    errors: list[BaseException] = []
    interrupt = Interrupt()  # the threads follow it
    try:
        with ThreadPoolExecutor(len(shares)) as pool:
            while training or (waiting and not interrupt.signal):
                for run in [run for run in waiting if run.ready][: 0 if interrupt.signal else len(free)]:
                    waiting.remove(run)
                    devices = free.pop(0)
                    training[pool.submit(contextvars.copy_context().run, work, run, devices)] = devices
                for done in wait(training, POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                    free.append(training.pop(done))
                    if error := done.exception():
                        errors.append(error)
                        interrupt.signal = interrupt.signal or signal.SIGTERM
    finally:
        interrupt.restore()
    for error in errors:
        if not isinstance(error, Interrupted):
            raise error
    if interrupt.signal:
        raise Interrupted(
            "interrupted; all runs are saved: run the same command to continue", interrupt.signal
        )


def seconds_left(runs: Sequence[Entry]) -> float:
    """Estimate the seconds left from what complete runs took, of the same label if possible; 0 before the first."""
    took: dict[str, list[float]] = {}
    for run in runs:
        if run.complete:
            took.setdefault(run.label, []).append(run.seconds())
    means = {label: statistics.fmean(seconds) for label, seconds in took.items()}
    usual = statistics.fmean(means.values()) if means else 0.0
    return sum(means.get(run.label, usual) for run in runs if not run.complete)
