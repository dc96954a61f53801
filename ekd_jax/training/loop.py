"""The training loop: the order of events.

    check the directory -> open the data -> build -> restore or initialize -> place the data -> compile
    -> (steps -> record -> evaluate -> checkpoint)* -> summary

What happens at which step depends on the configuration alone, and the number of steps per dispatch is an
argument of the one compiled program. So a run that was killed and started again goes through the same
computations as one that was not, and ends with the same bits.
"""

import contextlib
import dataclasses
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
from ml_collections import FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import Interrupted, UserError, reason
from ekd_jax.common.log import logger
from ekd_jax.common.progress import Progress
from ekd_jax.common.records import read_record, write_record
from ekd_jax.data.dataset import Source
from ekd_jax.data.feed import EvaluationSet, Feed, evaluation_set, training_feed
from ekd_jax.data.opening import facts
from ekd_jax.runs import workdir
from ekd_jax.runs.checkpoint import Checkpoints
from ekd_jax.runs.evaluation import Results, make_evaluator, measure, results
from ekd_jax.runs.metrics import MetricWriter
from ekd_jax.runs.records import Summary
from ekd_jax.runs.run import make_predict
from ekd_jax.runs.state import InitialWeights, TrainState, init_state, start_from
from ekd_jax.runs.teachers import load_teacher
from ekd_jax.training.autotune import choose_execution
from ekd_jax.training.optimizer import rate_in_words
from ekd_jax.training.report import (
    Log,
    early_stop,
    early_stop_line,
    evaluation_line,
    summarize,
    train_line,
)
from ekd_jax.training.setup import Setup, check_batches, class_weights_in_words, frozen_in_words, prepare
from ekd_jax.training.step import make_train_steps, zero_metrics
from ekd_jax.training.teaching import frozen_inputs, make_teach

# Target length of one dispatch: short enough to react to signals, long enough to amortize overhead. On a CPU
# every dispatch asks for its memory anew, which takes 6 % of a one-second step (docs/performance.md).
DISPATCH_SECONDS = 3.0


class Interrupt:
    """Notes SIGINT and SIGTERM, so that the loop can stop where nothing is lost.

    All processes of a run stop together, whichever of them got the signal.

    Attributes:
        signal: the number of the signal, 0 if there was none.
    """

    def __init__(self) -> None:
        self.signal = 0
        in_main = (
            threading.current_thread() is threading.main_thread()
        )  # the only one that may handle signals
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.restore()  # a second signal acts at once

    def agreed(self, steps: int = 0) -> tuple[int, int]:
        """Agree on what all processes do next, and wait for all of them.

        Args:
            steps: this process's proposal.

        Returns:
            The number of steps of process 0, and the signal that any of them got, 0 if none did.
        """
        said = parallel.gathered(np.array([steps, self.signal], np.int32))
        stop = int(said[:, 1].max())
        self.signal = self.signal or stop
        return int(said[0, 0]), stop

    def restore(self) -> None:
        """Handle signals as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run(
    config: FrozenConfigDict, path: pathlib.Path, mesh: Mesh | None = None, source: Source | None = None
) -> Summary:
    """Train, or resume training, in the directory `path`.

    Args:
        config: a complete configuration.
        path: directory of the run. If it holds checkpoints of the same configuration, the run resumes from the
            latest; of a complete run the summary is returned.
        mesh: devices to train on; all if not given.
        source: the data set itself, if it is in memory.

    Returns:
        The summary of the complete run.

    Raises:
        UserError: the directory holds something else, the data is missing, the loss is not finite.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    mesh = mesh or parallel.make_mesh(fsdp=config.train.fsdp)
    known = facts(config, source)
    check_batches(config, mesh, known.train_examples if known else None)
    workdir.check(path, config)
    workdir.check_same_everywhere(path, config)
    if (path / workdir.SUMMARY).exists():
        logger.info(f"{path} holds the complete run: nothing to train")
        return read_record(path / workdir.SUMMARY, Summary, "the directory of a run")
    setup = prepare(config, mesh, path, source)
    workdir.check_description(path, config, setup.description)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with workdir.locked(path):
            workdir.claim(path, config)
            return _train(setup, path)
    except OSError as error:
        raise UserError(
            f"cannot write to --workdir={path}: {reason(error)}; what was saved before is intact"
        ) from error


def _train(setup: Setup, path: pathlib.Path) -> Summary:
    """Train in a locked directory: restore or initialize, go through the loop, summarize."""
    state = init_state(setup.networks, setup.optimizer, setup.config.seed, setup.taught)
    log = Log(zero_metrics(setup.networks, state, setup.taught))
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(path)
        stack.callback(checkpoints.close)
        if checkpoints.steps():
            state, remembered = checkpoints.restore(state, checkpoints.choose())
            log = Log.from_json(remembered["log"])
        elif source := setup.config.model.initial_weights:
            network = load_teacher(source, path, "model.initial_weights")
            given = InitialWeights(source, network.variables, network.class_names)
            state = start_from(state, setup.networks, given, setup.data.facts.class_names)
        if parallel.is_main():
            workdir.write_description(path, setup.description)
        writer = MetricWriter(path if parallel.is_main() else None, int(state.step))
        stack.callback(writer.close)
        interrupt = Interrupt()
        stack.callback(interrupt.restore)
        progress = Progress("training", setup.steps, int(state.step))
        stack.callback(progress.clear)
        record = Record(path, checkpoints, writer, progress, interrupt)

        _announce(setup, int(state.step), progress)
        progress.update(int(state.step), "choosing how branches run")
        networks, said = choose_execution(setup, state, log.execution)
        setup, log.execution = dataclasses.replace(setup, networks=networks), networks.ensemble.execution
        if said:
            progress.line(said)
        step = _through_the_loop(setup, state, log, record)
        checkpoints.wait()
    if step < setup.steps and not log.stopped:
        raise Interrupted(
            f"interrupted at step {step:,}, saved in {path}: run the same command to resume",
            interrupt.signal,
        )
    summary = summarize(setup, log)
    if parallel.is_main():
        write_record(path / workdir.SUMMARY, summary)
    _, stop = interrupt.agreed()  # also: all processes wait until the summary is there
    if stop:  # the signal came while the run ended; another run of the plan may be about to follow
        raise Interrupted(
            f"interrupted; the run in {path} is complete: run the same command to continue", stop
        )
    return summary


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


def _through_the_loop(setup: Setup, state: TrainState, log: Log, record: "Record") -> int:
    """Place the data and train; return the step reached, which is saved."""
    step = int(state.step)
    record.progress.update(step, "reading")
    started = time.monotonic()
    watched = evaluation_set(setup.config, setup.data, setup.mesh, setup.watched)
    with contextlib.closing(training_feed(setup.config, setup.data, setup.mesh, setup.steps)) as feed:
        if step < setup.steps and not log.stopped:
            feed.load(step)
        log.seconds["read"] += time.monotonic() - started
        return Loop(setup, feed, watched, state, log, record).train()


@dataclasses.dataclass(frozen=True)
class Record:
    """The directory that a run writes to, and the signals that interrupt it.

    Attributes:
        path: directory of the run.
        checkpoints, writer, progress, interrupt: in that directory, and on the terminal.
    """

    path: pathlib.Path
    checkpoints: Checkpoints
    writer: MetricWriter
    progress: Progress
    interrupt: Interrupt


class Loop:
    """Training from a state to the last step, or until it is interrupted.

    Args:
        setup: of the run.
        feed: its training batches.
        watched: the examples that are evaluated while training.
        state: where it starts or resumes, numpy arrays.
        log: what it remembers.
        record: where it writes to.
    """

    def __init__(
        self, setup: Setup, feed: Feed, watched: EvaluationSet, state: TrainState, log: Log, record: Record
    ):
        self.setup, self.feed, self.watched, self.log, self.record = setup, feed, watched, log, record
        self.step = int(state.step)
        config, mesh = setup.config, setup.mesh
        self.zeros = jax.tree.map(np.zeros_like, log.sums)
        shardings = parallel.state_shardings(mesh, state)
        self.state = parallel.place(state, shardings)
        log.sums = parallel.replicate(mesh, log.sums)
        self.record_every = config.train.log_every_steps
        self.evaluate_every = setup.steps_in(config.train.evaluate_every_epochs)
        self.save_every = setup.steps_in(config.train.checkpoint_every_epochs)

        started = time.monotonic()
        record.progress.update(self.step, "compiling")
        self.one = parallel.replicate(mesh, np.int32(1))
        frozen = frozen_inputs(setup, feed)
        key = jax.random.key_data(jax.random.key(config.seed))
        self.frozen = parallel.replicate(mesh, {**frozen, "key": key})
        teach = make_teach(setup.teachers, config.data)
        train_steps = make_train_steps(setup, feed, teach, shardings)
        self.train_steps = train_steps.lower(
            self.state, log.sums, feed.shapes, self.one, self.frozen
        ).compile()
        log.seconds["compile"] += time.monotonic() - started
        self.evaluator: Any = None

    def train(self) -> int:
        """Train; return the step reached, which is saved."""
        setup, interrupt = self.setup, self.record.interrupt
        number, stop = 1, 0
        self.record.progress.restart_clock()
        with jax.transfer_guard("disallow"):
            while not (self.ended or stop):
                due = self._next_event()
                taken = min(number, due - self.step)
                seconds = self._advance(taken)
                number = max(1, min(2 * number, math.floor(DISPATCH_SECONDS * taken / seconds)))
                number, stop = interrupt.agreed(number)
                if self.step < due and not stop:
                    continue
                self._check_finite()
                if self.step % self.record_every == 0 or self.step == setup.steps:
                    self._write_record()
                evaluation = self._evaluate() if self._must_evaluate() else None
                if self.log.stopped and self.log.recorded < self.step:
                    self._write_record()
                if evaluation or self.step % self.save_every == 0 or stop:
                    self._save(evaluation)
        return self.step

    @property
    def ended(self) -> bool:
        """True after the last step, or where the run ended early."""
        return self.step == self.setup.steps or self.log.stopped > 0

    def _next_event(self) -> int:
        """Return the next step at which something is recorded, evaluated or saved."""
        intervals = (self.record_every, self.evaluate_every, self.save_every)
        return min(self.setup.steps, *((self.step // n + 1) * n for n in intervals))

    def _must_evaluate(self) -> bool:
        left = self.setup.steps - self.step
        soon_over = left < self.evaluate_every / 2  # the last evaluation follows soon
        return left == 0 or (self.step % self.evaluate_every == 0 and not soon_over)

    def _advance(self, number: int) -> float:
        """Take `number` steps, and return the seconds that they took.

        They are as few dispatches as the feed allows; devices have the next one before they finish the last.
        """
        log, feed, mesh = self.log, self.feed, self.setup.mesh
        began, last, waited = time.monotonic(), self.step + number, 0.0
        in_flight: list[Any] = []  # dispatches that may not be done
        while self.step < last:
            several = min(last - self.step, feed.max_steps())
            if not feed.is_ready(self.step):
                jax.block_until_ready(in_flight)  # until then the devices are busy
            started = time.monotonic()
            held = feed.load(self.step)
            waited += time.monotonic() - started
            count = parallel.replicate(mesh, np.int32(several))
            self.state, log.sums, done = self.train_steps(self.state, log.sums, held, count, self.frozen)
            jax.block_until_ready(in_flight)
            in_flight = [done]
            self.step += several
        self.state, log.sums = jax.block_until_ready((self.state, log.sums))
        seconds = time.monotonic() - began
        log.seconds["train"] += seconds
        log.window += seconds
        log.waited += waited
        speed = number * self.setup.config.train.batch_size / seconds
        self.record.progress.update(
            self.step, f"epoch {self.setup.epochs(self.step):.2f}  {speed:,.0f} images/s"
        )
        return seconds

    def _check_finite(self) -> None:
        """Raise UserError if a metric is not finite: such a state is neither recorded nor saved."""
        self.sums = {name: float(value) for name, value in jax.device_get(self.log.sums).items()}
        bad = [name for name, value in self.sums.items() if not math.isfinite(value)]
        if bad:
            self.record.checkpoints.wait()
            saved = self.record.checkpoints.steps()
            kept = f"the latest checkpoint is of step {saved[-1]:,}" if saved else "no checkpoint was saved"
            raise UserError(
                f"{bad[0]} is not finite between steps {self.log.recorded:,} and {self.step:,} ({kept}): "
                f"try a lower optimizer.learning_rate in a new --workdir"
            )

    def _write_record(self) -> None:
        """Write the means of the metrics since the last record."""
        log, record = self.log, self.record
        steps = self.step - log.recorded
        means = {name: value / steps for name, value in self.sums.items()}
        means["images/s"] = round(steps * self.setup.config.train.batch_size / log.window, 1)
        means["input_wait"] = round(100 * log.waited / log.window, 2)
        record.writer.write(self.step, self.setup.epochs(self.step), "train", means)
        record.progress.line(train_line(self.setup, self.step, means, record.progress))
        log.sums, log.recorded = parallel.replicate(self.setup.mesh, self.zeros), self.step
        log.window = log.waited = 0.0

    def _evaluate(self) -> Results:
        """Evaluate on the watched set, and where the run ends also on the test set."""
        setup, log, watched = self.setup, self.log, self.watched
        if self.evaluator is None:  # compiled when it is first needed: the first step need not wait for it
            self._compile_evaluator()
        started = time.monotonic()
        evaluation = self._measure(self.evaluator, watched)
        log.note_best(evaluation, self.step, setup.names)
        if early := early_stop(setup, log, self.step):
            log.stopped = self.step
            self.record.progress.line(early_stop_line(early))
        if watched.name == "test":
            log.last = evaluation
        elif self.ended:
            with jax.transfer_guard("allow"):
                test = evaluation_set(setup.config, setup.data, setup.mesh, "test")
            predict = make_predict(setup.networks)
            log.last = self._measure(make_evaluator(predict, setup.config, test.examples, setup.mesh), test)
        log.seconds["evaluate"] += time.monotonic() - started
        return evaluation

    def _compile_evaluator(self) -> None:
        setup, watched, started = self.setup, self.watched, time.monotonic()
        self.record.progress.update(self.step, "compiling the evaluation")
        jitted = make_evaluator(make_predict(setup.networks), setup.config, watched.examples, setup.mesh)
        self.evaluator = jitted.lower(self.state.variables, *watched.shapes, self.one).compile()
        self.log.seconds["compile"] += time.monotonic() - started

    def _measure(self, evaluate: Any, examples: EvaluationSet) -> Results:
        """Evaluate on a set, write it down and say it."""
        setup, record, epoch = self.setup, self.record, self.setup.epochs(self.step)
        scores_3xP = measure(evaluate, self.state.variables, examples, setup.mesh)["scores"]
        evaluation = results(scores_3xP, examples.examples, setup.names)
        record.writer.write(self.step, epoch, examples.name, evaluation)
        record.progress.line(evaluation_line(examples.name, epoch, evaluation, setup.names))
        return evaluation

    def _save(self, evaluation: Results | None) -> None:
        remembered = {
            "epoch": self.setup.epochs(self.step),
            "log": self.log.as_json(),
            "evaluated_on": self.watched.name,
        }
        self.record.checkpoints.save(self.state, remembered, evaluation)
