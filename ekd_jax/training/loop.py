"""The training loop: order of events, nothing else.

    check the folder -> open the data -> build -> restore or initialize -> place the data -> compile
    -> (steps -> record -> evaluate -> checkpoint)* -> summary

What happens at which step depends on the configuration alone, and how many steps a dispatch takes is an
argument of the one compiled program. So a run that was killed and started again goes through the same
computations as one that was not, and ends with the same bits.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import signal
import threading
import time
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import write_json
from ekd_jax.common.progress import Progress
from ekd_jax.data.feed import EvaluationSet, Feed, evaluation_set, training_feed
from ekd_jax.data.opening import facts
from ekd_jax.runs import workdir
from ekd_jax.runs.checkpoint import Checkpoints
from ekd_jax.runs.evaluation import make_evaluator, measure, results
from ekd_jax.runs.metrics import MetricWriter
from ekd_jax.runs.restore import predictor
from ekd_jax.runs.state import TrainState, begin_with, init_state
from ekd_jax.runs.teachers import load_teacher
from ekd_jax.training.autotune import choose_execution
from ekd_jax.training.optimizer import rate_in_words
from ekd_jax.training.report import Log, evaluation_line, summarize, train_line
from ekd_jax.training.setup import Job, check_batches, prepare, steps_in
from ekd_jax.training.step import make_train_steps, zero_metrics
from ekd_jax.training.teaching import frozen_inputs, make_teach

# The host looks at it so often: short to wait for, and rare enough. On a CPU every dispatch asks for its
# memory anew, which takes 6 % of a second where a step does (docs/performance.md).
STRETCH_SECONDS = 3.0


class Interrupt:
    """Remembers SIGINT and SIGTERM, so that the loop can stop where nothing is lost; in all processes of
    the run, whichever of them it came to.

    Attributes:
        signal: the number of the signal that came, 0 if none did.
    """

    def __init__(self) -> None:
        self.signal = 0
        in_main = threading.current_thread() is threading.main_thread()  # where signals are handled
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.restore()  # a second one acts at once

    def agreed(self, steps: int = 0) -> tuple[int, int]:
        """What all processes do next: process 0's number of steps, and the signal that came to any of them,
        0 if none did; waits for all of them."""
        said = parallel.gathered(np.array([steps, self.signal], np.int32))
        stop = int(said[:, 1].max())
        self.signal = self.signal or stop
        return int(said[0, 0]), stop

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run(config: Any, path: pathlib.Path, mesh: Mesh | None = None) -> dict[str, Any]:
    """Trains, or goes on training, in the folder `path`; returns the summary.

    Args:
        config: resolved.
        path: the run's folder. If it holds checkpoints of the same configuration, the run goes on
            from the latest; a complete run is only reported.
        mesh: all devices if not given.

    Raises:
        UserError: the folder holds something else, the data is missing, the loss is not finite.
        SystemExit: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    mesh = mesh or parallel.make_mesh(fsdp=config.train.fsdp)
    known = facts(config)
    check_batches(config, mesh, known.train_examples if known else None)
    workdir.check(path, config)
    workdir.check_shared(path, config)
    if (path / workdir.SUMMARY).exists():
        print(f"{path} holds the complete run: nothing to train")
        summary: dict[str, Any] = json.loads((path / workdir.SUMMARY).read_text())
        return summary
    job = prepare(config, mesh, path)
    workdir.check_teachers(path, job.students["teachers"])
    try:
        path.mkdir(parents=True, exist_ok=True)
        with workdir.locked(path):
            workdir.claim(path, config)
            return _run(job, path)
    except OSError as error:
        raise UserError(
            f"cannot write to --workdir={path}: {reason(error)}; what was saved before is whole"
        ) from error


def _run(job: Job, path: pathlib.Path) -> dict[str, Any]:
    """Trains in a folder that is ours: restores or initializes, goes through the loop, sums up."""
    taught = job.taught
    state = init_state(job.trace, job.method, job.optimizer, job.config.seed, taught)
    log = Log(zero_metrics(job.trace, job.method, state, taught))
    checkpoints = Checkpoints(path)
    if checkpoints.steps():
        state, remembered = checkpoints.restore(state, checkpoints.choose())
        log = Log.recall(remembered)
    elif source := job.config.model.initial_weights:
        network = load_teacher(source, path, "model.initial_weights").variables
        state = begin_with(state, job.ensemble, network, source)
    if parallel.is_main():
        workdir.describe(path, job.students)
    writer = MetricWriter(path if parallel.is_main() else None, int(state.step))
    progress = Progress(job.steps, int(state.step))
    interrupt = Interrupt()
    try:
        progress.line(
            f"{'going on from' if state.step else 'training from'} step {state.step:,} of {job.steps:,}: "
            f"{job.config.model.name}, {len(job.ensemble.students)} students, {job.config.method.name}, "
            f"{job.data.facts.name} ({job.examples:,} images), "
            f"{job.mesh.size} x {job.mesh.devices.flat[0].device_kind}"
        )
        if said := rate_in_words(job.config):
            progress.line(said)
        progress.update(int(state.step), "choosing how branches run")
        ensemble, said = choose_execution(job, state, log.execution)
        job, log.execution = dataclasses.replace(job, ensemble=ensemble), ensemble.execution
        if said:
            progress.line(said)
        progress.update(int(state.step), "reading")
        started = time.monotonic()
        watched = evaluation_set(job.config, job.data, job.mesh, job.watched)
        with contextlib.closing(training_feed(job.config, job.data, job.mesh, job.steps)) as feed:
            if state.step < job.steps:
                feed.at(int(state.step))
            log.seconds["read"] += time.monotonic() - started
            step = _loop(job, feed, watched, state, log, checkpoints, writer, progress, interrupt)
        checkpoints.wait()
    finally:
        progress.clear()
        interrupt.restore()
        checkpoints.close()
        writer.close()
    if step < job.steps:
        print(f"interrupted at step {step:,}, saved in {path}: run the same command to go on")
        raise SystemExit(128 + interrupt.signal)
    summary = summarize(job, log)
    if parallel.is_main():
        write_json(path / workdir.SUMMARY, summary)
    _, stop = interrupt.agreed()  # also: all wait until the summary is there
    if stop:  # while the run ended; another one may be to follow
        print(f"interrupted; the run in {path} is complete: run the same command to go on")
        raise SystemExit(128 + stop)
    return summary


def _loop(
    job: Job,
    feed: Feed,
    watched: EvaluationSet,
    state: TrainState,
    log: Log,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    progress: Progress,
    interrupt: Interrupt,
) -> int:
    """Trains until the last step or an interruption; returns the step reached, which is saved."""
    config, mesh = job.config, job.mesh
    batch_size, step = config.train.batch_size, int(state.step)
    zeros = jax.tree.map(np.zeros_like, log.sums)
    shardings = parallel.state_shardings(mesh, state)
    state, log.sums = parallel.place(state, shardings), parallel.replicate(mesh, log.sums)

    started = time.monotonic()
    progress.update(step, "compiling")
    one = parallel.replicate(mesh, np.int32(1))
    frozen = frozen_inputs(job.teachers, config, job.data, feed)
    frozen = parallel.replicate(mesh, {**frozen, "key": jax.random.key_data(jax.random.key(config.seed))})
    train_steps = make_train_steps(
        config,
        job.ensemble,
        job.method,
        job.optimizer,
        feed,
        job.data.facts.num_classes,
        mesh,
        job.steps,
        make_teach(job.teachers, config.data),
        shardings,
    )
    train_steps = train_steps.lower(state, log.sums, feed.shapes, one, frozen).compile()
    log.seconds["compile"] += time.monotonic() - started
    predict = predictor(job.ensemble, job.method)

    @functools.cache
    def evaluator() -> Any:
        """Compiled when it is first wanted: the first step need not wait for it."""
        started = time.monotonic()
        progress.update(step, "compiling the evaluation")
        jitted = make_evaluator(predict, config, watched.examples, mesh)
        program = jitted.lower(state.variables, *watched.shapes, one).compile()
        log.seconds["compile"] += time.monotonic() - started
        return program

    record_every = config.train.log_every_steps
    evaluate_every = steps_in(config.train.evaluate_every_epochs, config, job.examples)
    save_every = steps_in(config.train.checkpoint_every_epochs, config, job.examples)
    stretch, stop = 1, 0
    progress.begin()
    with jax.transfer_guard("disallow"):
        while step < job.steps and not stop:
            due = min(job.steps, *((step // n + 1) * n for n in (record_every, evaluate_every, save_every)))
            number = min(stretch, due - step)
            started = time.monotonic()
            state, log.sums, waited = _advance(
                train_steps, state, log.sums, frozen, feed, mesh, step, number
            )
            took = time.monotonic() - started
            log.seconds["train"] += took
            log.window += took
            log.waited += waited
            stretch = max(1, min(2 * stretch, math.floor(STRETCH_SECONDS * number / took)))
            stretch, stop = interrupt.agreed(stretch)
            step += number
            epoch = job.epochs(step)
            progress.update(step, f"epoch {epoch:.2f}  {number * batch_size / took:,.0f} images/s")
            if step < due and not stop:
                continue

            sums = {name: float(value) for name, value in jax.device_get(log.sums).items()}
            _check_finite(sums, log.recorded, step, checkpoints)
            last_step = step == job.steps
            if step % record_every == 0 or last_step:
                steps = step - log.recorded
                means = {name: value / steps for name, value in sums.items()}
                means["images/s"] = round(steps * batch_size / log.window, 1)
                means["input_wait"] = round(100 * log.waited / log.window, 2)
                writer.write(step, epoch, "train", means)
                progress.line(train_line(job, step, means, progress))
                log.sums, log.recorded = parallel.replicate(mesh, zeros), step
                log.window = log.waited = 0.0

            evaluation = None
            near_the_end = job.steps - step < evaluate_every / 2  # the last evaluation follows soon
            if last_step or (step % evaluate_every == 0 and not near_the_end):
                evaluate = evaluator()
                started = time.monotonic()
                sums_3xP = measure(evaluate, state.variables, watched, mesh)
                evaluation = results(sums_3xP, watched.examples, job.names)
                log.note_best(evaluation, step, job.names)
                writer.write(step, epoch, watched.name, evaluation)
                progress.line(evaluation_line(watched.name, epoch, evaluation, job.names))
                if watched.name == "test":
                    log.last = evaluation
                elif last_step:
                    with jax.transfer_guard("allow"):
                        test = evaluation_set(config, job.data, mesh, "test")
                    evaluate = make_evaluator(predict, config, test.examples, mesh)
                    sums_3xP = measure(evaluate, state.variables, test, mesh)
                    log.last = results(sums_3xP, test.examples, job.names)
                    writer.write(step, epoch, "test", log.last)
                    progress.line(evaluation_line("test", epoch, log.last, job.names))
                log.seconds["evaluate"] += time.monotonic() - started
            if evaluation or step % save_every == 0 or stop:
                remembered = {"epoch": epoch, "log": log.as_json(), "evaluated_on": watched.name}
                checkpoints.save(state, remembered, evaluation)
    return step


def _advance(
    train_steps: Any,
    state: TrainState,
    sums: Any,
    frozen: Any,
    feed: Feed,
    mesh: Mesh,
    step: int,
    number: int,
) -> tuple[TrainState, Any, float]:
    """Takes `number` steps from `step`, to their end, in as few dispatches as the feed allows; devices have
    the next one before they are done with the last. Gives also the seconds that they waited for images."""
    last, waited = step + number, 0.0
    flying: list[Any] = []  # dispatches that may not be done
    while step < last:
        number = min(last - step, feed.most())
        if not feed.ready(step):
            jax.block_until_ready(flying)  # until then they have something to do
        started = time.monotonic()
        held = feed.at(step)
        waited += time.monotonic() - started
        several = parallel.replicate(mesh, np.int32(number))
        state, sums, done = train_steps(state, sums, held, several, frozen)
        jax.block_until_ready(flying)
        flying = [done]
        step += number
    state, sums = jax.block_until_ready((state, sums))
    return state, sums, waited


def _check_finite(sums: dict[str, float], first: int, step: int, checkpoints: Checkpoints) -> None:
    """A state that is not finite is neither recorded nor saved."""
    bad = [name for name, value in sums.items() if not math.isfinite(value)]
    if bad:
        checkpoints.wait()
        saved = checkpoints.steps()
        kept = f"the latest checkpoint is of step {saved[-1]:,}" if saved else "no checkpoint was saved"
        raise UserError(
            f"{bad[0]} is not finite between steps {first:,} and {step:,} ({kept}): "
            f"try a lower optimizer.learning_rate in a new --workdir"
        )
