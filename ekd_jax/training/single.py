"""One run from its beginning to its end.

check the directory -> open the data -> build -> restore or initialize -> train -> summary
"""

import contextlib
import dataclasses
import errno
import pathlib
from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import Interrupted, UserError, reason
from ekd_jax.common.log import logger
from ekd_jax.common.progress import Progress
from ekd_jax.common.records import write_record
from ekd_jax.config.build import build_method
from ekd_jax.config.resolve import read_config, steps_in, to_dict
from ekd_jax.data.dataset import Source
from ekd_jax.data.opening import facts
from ekd_jax.runs import history, workdir
from ekd_jax.runs.checkpoint import Checkpoints, saved_steps
from ekd_jax.runs.history import Permit
from ekd_jax.runs.metrics import MetricWriter
from ekd_jax.runs.records import A_RUN, CONFIG, SUMMARY, Summary
from ekd_jax.runs.state import InitialWeights, TrainState, init_state, start_from
from ekd_jax.runs.teachers import load_teacher
from ekd_jax.runs.tracking import Tracker, check_tracker
from ekd_jax.training.interrupt import Interrupt
from ekd_jax.training.live import live_table
from ekd_jax.training.loop import DivergedError, NotFiniteError, Record, Watch, after_not_finite, open_loop
from ekd_jax.training.optimizer import make_schedule, rate_factor, rate_in_words
from ekd_jax.training.profile import FOLDER, Profile
from ekd_jax.training.report import Log, summarize
from ekd_jax.training.setup import (
    Setup,
    check_batches,
    class_weights_in_words,
    frozen_in_words,
    prepare,
)
from ekd_jax.training.step import zero_tally


def run(
    config: FrozenConfigDict,
    path: pathlib.Path,
    mesh: Mesh | None = None,
    source: Source | None = None,
    permit: Permit | None = None,
    profile: int = 0,
    watch: Watch = lambda epoch, evaluation: None,
) -> Summary:
    """Train, or resume training, in the directory `path`.

    Args:
        config: a complete configuration.
        path: directory of the run. If it holds checkpoints of the same configuration, the run resumes from the
            latest that is whole; of a complete run the summary is returned.
        mesh: devices to train on; all if not given.
        source: the data set itself, if it is in memory.
        permit: what of the configuration may be another one than the run was started with; nothing if not given.
        profile: how many steps are traced by JAX's profiler, into the directory.
        watch: called with the epoch and the results of each evaluation but the last; its errors end the run.

    Returns:
        The summary of the complete run.

    Raises:
        UserError: the directory holds something else, the data is missing.
        DivergedError: the loss is not finite.
        Interrupted: a signal came; a checkpoint was saved.
    """
    check_tracker(config.train.tracker)
    mesh = mesh or parallel.make_mesh(fsdp=config.train.fsdp)
    known = facts(config, source)
    check_batches(config, mesh, known.train_examples if known else None)
    changes = workdir.check(path, config, permit)
    workdir.check_same_everywhere(path, config)
    if (path / SUMMARY).exists() and not changes:
        if profile:
            raise UserError(
                f"--profile={profile}: the run in {path} is complete, there is no step to trace"
            )
        logger.info(f"{path} holds the complete run: nothing to train")
        return workdir.read_summary(path)
    setup = prepare(config, mesh, path, source)
    workdir.check_description(path, config, setup.description)
    state, trace = first_state(setup, path), Profile(profile, path / FOLDER)
    trace.plan(max(saved_steps(path), default=0), setup.steps)
    if changes:
        history.check(path, setup.steps, state, changes)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with workdir.locked(path):
            workdir.claim(path, config)
            if changes and permit:
                history.change(path, config, {**changes, **_changed_rate(setup, path)}, permit)
            with contextlib.ExitStack() as stack:
                checkpoints, interrupt = Checkpoints(path), Interrupt()
                stack.callback(checkpoints.close)
                stack.callback(interrupt.restore)
                return _train(setup, path, state, checkpoints, interrupt, trace, watch)
    except OSError as error:
        raise UserError(f"{_what_failed(path, error)}; what was saved before is intact") from error


def _what_failed(path: pathlib.Path, error: OSError) -> str:
    """Return what could not be read or written while a run trained in `path`."""
    named = error.filename if isinstance(error.filename, str) else ""
    elsewhere = named and not pathlib.Path(named).absolute().is_relative_to(path.absolute())
    if elsewhere or error.errno == errno.EIO:
        return f"training in --workdir={path} had to end: {reason(error)}"
    return f"cannot write to --workdir={path}: {reason(error)}"


def _changed_rate(setup: Setup, path: pathlib.Path) -> dict[str, tuple[float, float]]:
    """Return the learning rate of a run's next step as it was and as it will be; nothing if it is the same."""
    old, step = read_config(path / CONFIG, A_RUN), max(saved_steps(path), default=0)
    method, steps = build_method(old), steps_in(old.train.epochs, old, setup.examples)
    rates = (
        float(make_schedule(config, method, steps)(step))
        for config, method, steps in (
            (old, method, steps),
            (setup.config, setup.networks.method, setup.steps),
        )
    )
    before, after = (float(f"{rate:.6g}") for rate in rates)
    return {} if before == after else {"learning rate": (before, after)}


def first_state(setup: Setup, path: pathlib.Path) -> TrainState:
    """Return the state before the first step; nothing is written."""
    state = init_state(setup.networks, setup.optimizer, setup.config.seed, setup.taught)
    source = setup.config.model.initial_weights
    if not source or saved_steps(path):
        return state
    network = load_teacher(source, path, "model.initial_weights")
    given = InitialWeights(source, network.variables, network.class_names)
    return start_from(state, setup.networks, given, setup.data.facts.class_names)


def slowed(setup: Setup, rewinds: int) -> Setup:
    """Return the setup of a run that was rewound so often: its updates are smaller."""
    if not rewinds:
        return setup
    usual, factor = setup.optimizer, rate_factor(setup.config, rewinds)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = usual.update(gradients, state, params)
        return optax.tree.scale(factor, updates), state

    slower = optax.GradientTransformation(usual.init, update)  # its state is that of the usual one
    return dataclasses.replace(setup, optimizer=slower)


def resumed(
    setup: Setup, first: TrainState, saved: tuple[TrainState, Any] | None
) -> tuple[TrainState, Log]:
    """Return the state and the log that training goes on from.

    Args:
        setup: of the run.
        first: the state before the first step.
        saved: the state of a checkpoint and what the run remembered with it; None to begin.
    """
    log = Log(zero_tally(setup, first))
    return (saved[0], Log.from_json(saved[1]["log"], log.tally)) if saved else (first, log)


def _train(
    setup: Setup,
    path: pathlib.Path,
    first: TrainState,
    checkpoints: Checkpoints,
    interrupt: Interrupt,
    profile: Profile,
    watch: Watch,
) -> Summary:
    """Train in a locked directory until the run is complete; rewind it as often as it may be."""
    limit = setup.config.train.nonfinite_limit
    while True:
        rewinds = history.rewinds(path)
        try:
            log = _train_from(slowed(setup, rewinds), path, first, checkpoints, interrupt, profile, watch)
            break
        except NotFiniteError as error:
            checkpoints.wait()
            step = max(checkpoints.steps(), default=0)
            if setup.config.train.nonfinite != "rewind" or rewinds >= limit:
                raise DivergedError(f"{error}; {after_not_finite(setup, step, error)}") from error
            # a smaller rate did not help: the state is no good
            if step and history.last_rewind(path) == step:
                checkpoints.discard(step)
                step = max(checkpoints.steps(), default=0)
            factor = rate_factor(setup.config, rewinds + 1)
            history.rewind(path, step, error.step, factor)
            logger.warning(
                f"{error}: going on from step {step:,} with learning rates times {factor:g} (rewound "
                f"{rewinds + 1} of at most {limit} times)"
            )
            first = first_state(setup, path)  # arrays of the other were given to the devices
    summary = summarize(setup, log)
    if parallel.is_main():
        write_record(path / SUMMARY, summary)
    _, stop = interrupt.agreed()  # also: all processes wait until the summary is there
    if stop:  # the signal came while the run ended; another run of the plan may be about to follow
        raise Interrupted(
            f"interrupted; the run in {path} is complete: run the same command to continue", stop
        )
    return summary


def _train_from(
    setup: Setup,
    path: pathlib.Path,
    state: TrainState,
    checkpoints: Checkpoints,
    interrupt: Interrupt,
    profile: Profile,
    watch: Watch,
) -> Log:
    """Train from the newest checkpoint, or from `state` without one, and return the log of the complete run.

    Raises:
        NotFiniteError: as `Loop.train`.
        Interrupted: a signal came; a checkpoint was saved.
    """
    state, log = resumed(setup, state, checkpoints.recover(state))
    step = int(state.step)
    with contextlib.ExitStack() as stack:
        if parallel.is_main():
            workdir.write_description(path, setup.description)
        writer = _writer(setup, path, step, log)
        stack.callback(writer.close)
        table = live_table(setup, path, writer.latest, checkpoints)
        progress = Progress("training", setup.steps, step, table=table)
        stack.callback(progress.clear)
        stack.callback(profile.close)
        record = Record(path, checkpoints, writer, progress, interrupt, profile, watch)
        _announce(setup, step, progress)
        with open_loop(setup, state, log, record) as loop:
            loop.train()
        checkpoints.wait()
    if not loop.complete:
        raise Interrupted(
            f"interrupted at step {loop.step:,}, saved in {path}: run the same command to resume",
            interrupt.signal,
        )
    return log


def _writer(setup: Setup, path: pathlib.Path, step: int, log: Log) -> MetricWriter:
    """Open the records of a run that goes on from a step; process 0 writes for all."""
    if not parallel.is_main():
        return MetricWriter(None, step, log.evaluated)
    name = setup.config.train.tracker
    tracker = Tracker(name, path, to_dict(setup.config)) if name else None
    return MetricWriter(path, step, log.evaluated, tracker)


def _announce(setup: Setup, step: int, progress: Progress) -> None:
    """Say what is trained, on what."""
    progress.line(
        f"{'resuming from' if step else 'training from'} step {step:,} of {setup.steps:,}: "
        f"{setup.config.model.name}, {len(setup.networks.ensemble.students)} students, "
        f"{setup.config.method.name}, {setup.data.facts.name} ({setup.examples:,} images), "
        f"{setup.mesh.size} x {setup.mesh.devices.flat[0].device_kind}"
    )
    lines = (rate_in_words(setup.config), frozen_in_words(setup.config), class_weights_in_words(setup))
    for said in filter(None, lines):
        progress.line(said)
