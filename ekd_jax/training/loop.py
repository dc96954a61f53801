"""The training loop: the order of events.

    place the data -> compile -> (steps -> record -> evaluate -> checkpoint)*

What happens at which step depends on the configuration alone, and the number of steps per dispatch is an
argument of the one compiled program. So a run that was killed and started again goes through the same
computations as one that was not, and ends with the same bits.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ekd_jax.common import parallel
from ekd_jax.common.errors import Interrupted, UserError
from ekd_jax.common.log import logger
from ekd_jax.common.progress import Progress
from ekd_jax.data.classes import listed
from ekd_jax.data.feed import EvaluationSet, Feed, evaluation_set, training_feed
from ekd_jax.runs.checkpoint import Checkpoints
from ekd_jax.runs.evaluation import Results, make_evaluator, measure, results
from ekd_jax.runs.metrics import MEMORY, MetricWriter
from ekd_jax.runs.run import make_predict
from ekd_jax.runs.state import TrainState
from ekd_jax.training.autotune import choose_execution
from ekd_jax.training.board import BoardImages
from ekd_jax.training.interrupt import Interrupt
from ekd_jax.training.profile import Profile
from ekd_jax.training.report import Log, best_of, early_stop, early_stop_line, evaluation_line, train_line
from ekd_jax.training.setup import Setup
from ekd_jax.training.step import make_train_steps
from ekd_jax.training.tally import UPDATE_NORM, Tally, broken_parts
from ekd_jax.training.teaching import frozen_inputs, make_teach

# Target length of one dispatch: short enough to react to signals, long enough to amortize overhead. On a CPU
# every dispatch asks for its memory anew, which takes 6 % of a one-second step (docs/performance.md).
DISPATCH_SECONDS = 3.0
# What is called with the epoch and the results of each evaluation but the last; an error that it raises ends the run.
Watch = Callable[[float, Results], None]


class DivergedError(UserError):
    """Training ended because what it computes is not finite."""


class NotFiniteError(Exception):
    """Training came to a step in which the loss, or the state after it, was not finite.

    Attributes:
        step: the first such step, from 1.
    """

    def __init__(self, step: int, what: str):
        super().__init__(f"{what} not finite at step {step:,}")
        self.step = step


def _metrics_in_words(names: Sequence[str]) -> str:
    """Return which metrics "are" broken; an update follows from the losses, which sum up to `loss`."""
    updates = [name for name in names if name.endswith(UPDATE_NORM)]
    losses = [name for name in names if name not in updates and name != "loss"]
    what = losses or updates or list(names)
    return f"{listed(what)} {'is' if len(what) == 1 else 'are'}"


@dataclasses.dataclass(frozen=True)
class Record:
    """The directory that a run writes to, and the signals that interrupt it.

    Attributes:
        path: directory of the run.
        checkpoints, writer, progress, interrupt: in that directory, and on the terminal.
        profile: which steps are traced.
        watch: called after evaluations.
    """

    path: pathlib.Path
    checkpoints: Checkpoints
    writer: MetricWriter
    progress: Progress
    interrupt: Interrupt
    profile: Profile = dataclasses.field(default_factory=Profile)
    watch: Watch = lambda epoch, evaluation: None


def after_not_finite(setup: Setup, step: int, error: NotFiniteError) -> str:
    """Return what the user may do when a run has stopped because it was not finite."""
    saved = f"the latest checkpoint is of step {step:,}" if step else "no checkpoint was saved"
    changes = "optimizer.learning_rate=" + f"{setup.config.optimizer.learning_rate / 10:g}"
    if setup.config.train.nonfinite == "stop":
        changes += " or --resume_with=train.nonfinite=skip"
    else:
        saved = f"train.nonfinite_limit={setup.config.train.nonfinite_limit} is reached, {saved}"
    return (
        f"{saved}: --replay_step={error.step} shows where it begins; to go on, run the same command with "
        f"--resume_with={changes}"
    )


@contextlib.contextmanager
def open_loop(setup: Setup, state: TrainState, log: Log, record: Record) -> Iterator["Loop"]:
    """Choose how branches run, place the data, and compile, for a loop that starts from a state of numpy arrays."""
    step = int(state.step)
    record.progress.update(step, "choosing how branches run")
    networks, said = choose_execution(setup, state, log.execution)
    setup, log.execution = dataclasses.replace(setup, networks=networks), networks.ensemble.execution
    if said:
        record.progress.line(said)
    record.progress.update(step, "reading")
    started = time.monotonic()
    watched = evaluation_set(setup.config, setup.data, setup.mesh, setup.watched)
    with contextlib.closing(training_feed(setup.config, setup.data, setup.mesh, setup.steps)) as feed:
        if step < setup.steps and not log.stopped:
            feed.load(step)
        log.seconds["read"] += time.monotonic() - started
        yield Loop(setup, feed, watched, state, log, record)


class Loop:
    """Training from a state to the last step, or until it is interrupted.

    Attributes:
        step: number of steps taken.
        state: the train state after them, on the devices.

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
        self.images = BoardImages(setup, record.writer)
        self.step = int(state.step)
        config, mesh = setup.config, setup.mesh
        self.nothing = Tally.of(dict.fromkeys(log.tally.sums, 0.0))
        shardings = parallel.state_shardings(mesh, state)
        self.state = parallel.place(state, shardings)
        log.tally = parallel.replicate(mesh, log.tally)
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
        lowered = make_train_steps(setup, feed, teach, shardings).lower(
            self.state, log.tally, feed.shapes, self.one, self.frozen
        )
        self.train_steps: Any = record.interrupt.unless_it_comes(lowered.compile)
        log.seconds["compile"] += time.monotonic() - started
        self.evaluator: Any = None

    def train(self) -> None:
        """Train until the run is complete or a signal comes; what was reached is saved.

        Raises:
            NotFiniteError: a metric was not finite; neither recorded nor saved.
            DivergedError: more steps were skipped than may be.
        """
        interrupt = self.record.interrupt
        number, stop = 1, interrupt.agreed()[1]  # it may have come while the step was compiled
        self.record.progress.restart_clock()
        with jax.transfer_guard("disallow"):
            self._check_finite()
            if self._owes_evaluation and not stop:
                stop = self._evaluate_and_save()
            while not (self.complete or stop):
                self.record.profile.reach(self.step)
                due = self._next_event()
                if self.record.profile.active:
                    number = self.record.profile.steps
                number, stop = self._advance_some(number, due)
                if self.step < due and not stop:
                    continue
                self._check_finite()
                if self.step % self.record_every == 0 or self.step == self.setup.steps:
                    self._write_record()
                if self._owes_evaluation and not stop:
                    stop = self._evaluate_and_save()
                elif self.step % self.save_every == 0 or stop:
                    self._save(None)

    def advance_to(self, step: int) -> None:
        """Take steps up to number `step`; nothing is recorded, evaluated or saved.

        Raises:
            UserError: a metric was not finite before, and no step may be skipped.
            Interrupted: a signal came.
        """
        number = 1
        while self.step < step:
            number, stop = self._advance_some(number, step)
            if stop:
                raise Interrupted("interrupted; nothing was written", stop)
            try:
                self._check_finite()
            except NotFiniteError as error:
                raise UserError(f"{error}: replay that step") from error

    @property
    def complete(self) -> bool:
        """True when nothing is left to do: after the evaluation of the last step, or where the run ended early."""
        return self.log.evaluated == self.setup.steps or self.log.stopped > 0

    @property
    def _owes_evaluation(self) -> bool:
        """Whether the networks of this step are to be evaluated, and were not: a signal may have come before."""
        left = self.setup.steps - self.step
        soon_over = left < self.evaluate_every / 2  # the last evaluation follows soon
        due = left == 0 or (self.step > 0 and self.step % self.evaluate_every == 0 and not soon_over)
        return due and self.log.evaluated < self.step

    def _next_event(self) -> int:
        """Return the next step at which something is recorded, evaluated, saved or traced."""
        intervals = (self.record_every, self.evaluate_every, self.save_every)
        events = [(self.step // n + 1) * n for n in intervals]
        return min(self.setup.steps, *events, *self.record.profile.boundaries(self.step))

    def _advance_some(self, number: int, last: int) -> tuple[int, int]:
        """Take `number` steps, but none beyond `last`.

        Returns:
            How many to take next, so that it lasts `DISPATCH_SECONDS`, and the number of a signal, 0 without one.
        """
        taken = min(number, last - self.step)
        seconds = self._advance(taken)
        number = max(1, min(2 * number, math.floor(DISPATCH_SECONDS * taken / seconds)))
        return self.record.interrupt.agreed(number)

    def _advance(self, number: int) -> float:
        """Take `number` steps, and return the seconds that they took.

        They are as few dispatches as the feed allows; devices have the next one before they finish the last.
        """
        log, feed, mesh = self.log, self.feed, self.setup.mesh
        began, last, waited = time.monotonic(), self.step + number, 0.0
        in_flight: list[Any] = []  # dispatches that may not be done
        while self.step < last:
            several = min(last - self.step, 1 if self.record.profile.active else feed.max_steps())
            if not feed.is_ready(self.step):
                jax.block_until_ready(in_flight)  # until then the devices are busy
            started = time.monotonic()
            held = feed.load(self.step)
            waited += time.monotonic() - started
            count = parallel.replicate(mesh, np.int32(several))
            with jax.profiler.StepTraceAnnotation("train", step_num=self.step):
                self.state, log.tally, done = self.train_steps(
                    self.state, log.tally, held, count, self.frozen
                )
            jax.block_until_ready(in_flight)
            in_flight = [done]
            self.step += several
        self.state, log.tally = jax.block_until_ready((self.state, log.tally))
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
        """Read the tally from the devices, and see to it that a state that is not finite is not saved.

        Raises:
            NotFiniteError: a metric was not finite, and no step may be skipped.
            DivergedError: more steps were skipped than may be.
        """
        log, train = self.log, self.setup.config.train
        self.tally: Tally = jax.device_get(log.tally)
        if self.tally.first_broken is None:
            return
        step, names = self.tally.first_broken
        error = NotFiniteError(step, _metrics_in_words(names))
        if not self.setup.skips_nonfinite:
            raise error
        skipped = log.skipped + int(self.tally.skipped)
        limit, saved = train.nonfinite_limit, max(self.record.checkpoints.steps(), default=0)
        if skipped > limit:
            raise DivergedError(
                f"{error}, and {skipped} steps had to be skipped; {after_not_finite(self.setup, saved, error)}"
            ) from error
        self.record.progress.clear()
        logger.warning(f"{error}: the step is skipped ({skipped} of at most {limit} steps so far)")
        whole = Tally.of(self.tally.sums, int(self.tally.skipped))
        self.tally, log.tally = whole, parallel.replicate(self.setup.mesh, whole)

    def _write_record(self) -> None:
        """Write the means of the metrics since the last record."""
        log, record = self.log, self.record
        steps, skipped = self.step - log.recorded, int(self.tally.skipped)
        means = {name: float(value) / max(steps - skipped, 1) for name, value in self.tally.sums.items()}
        if self.setup.skips_nonfinite:
            means["skipped"] = float(skipped)
        means["images/s"] = round(steps * self.setup.config.train.batch_size / log.window, 1)
        means["input_wait"] = round(100 * log.waited / log.window, 2)
        means[MEMORY] = round(parallel.peak_memory(self.setup.mesh) / 1e6, 1)
        record.writer.write(self.step, self.setup.epochs(self.step), "train", means)
        record.progress.record(train_line(self.setup, self.step, means, record.progress))
        log.tally, log.recorded = parallel.replicate(self.setup.mesh, self.nothing), self.step
        log.skipped += skipped
        log.window = log.waited = 0.0

    def _evaluate_and_save(self) -> int:
        """Evaluate and save the step; return the number of a signal that came before it was done, else 0."""
        interrupt = self.record.interrupt
        evaluation = self._evaluate()
        if evaluation is None:
            self._save(None)
            return interrupt.signal
        if self.log.stopped and self.log.recorded < self.step:
            self._write_record()
        if not self.complete:  # before the state is saved, so that a run that is killed here calls it again
            self.record.watch(self.setup.epochs(self.step), evaluation)
        self._save(evaluation)
        self.images.after_evaluation(self.step, self.complete)
        return 0

    def _evaluate(self) -> Results | None:
        """Evaluate on the watched set, and where the run ends also on the test set; None if a signal came."""
        setup, log, watched, interrupt = self.setup, self.log, self.watched, self.record.interrupt
        if self.evaluator is None:  # compiled when it is first needed: the first step need not wait for it
            self.evaluator = self._compile_evaluator()
        if self.evaluator is None:
            return None
        started = time.monotonic()
        evaluation = interrupt.unless_it_comes(lambda: self._measure(self.evaluator, watched))
        if evaluation is None:
            return None
        found, best = {watched.name: evaluation}, best_of(log.best, evaluation, self.step, setup.names)
        early = early_stop(setup, int(best["ensemble"]["step"]), self.step)
        if watched.name != "test" and (early or self.step == setup.steps):
            tested = interrupt.unless_it_comes(self._test)
            if tested is None:
                return None
            found["test"] = tested
        log.best, log.last, log.evaluated = best, found.get("test", log.last), self.step
        log.seconds["evaluate"] += time.monotonic() - started
        epoch, record = setup.epochs(self.step), self.record
        for name, each in found.items():
            record.writer.write(self.step, epoch, name, each)
            record.progress.record(evaluation_line(name, epoch, each, setup.names))
        if early:
            log.stopped = self.step
            record.progress.line(early_stop_line(early))
        return evaluation

    def _compile_evaluator(self) -> Any:
        """Return the compiled evaluation of the watched set, None if a signal came."""
        setup, watched, started = self.setup, self.watched, time.monotonic()
        self.record.progress.update(self.step, "compiling the evaluation")
        jitted = make_evaluator(make_predict(setup.networks), setup.config, watched.examples, setup.mesh)
        lowered = jitted.lower(self.state.variables, *watched.shapes, self.one)
        compiled = self.record.interrupt.unless_it_comes(lowered.compile)
        self.log.seconds["compile"] += time.monotonic() - started
        return compiled

    def _test(self) -> Results:
        """Evaluate on the test set, which was not looked at before."""
        setup = self.setup
        with jax.transfer_guard("allow"):
            test = evaluation_set(setup.config, setup.data, setup.mesh, "test")
        evaluator = make_evaluator(make_predict(setup.networks), setup.config, test.examples, setup.mesh)
        return self._measure(evaluator, test)

    def _measure(self, evaluate: Any, examples: EvaluationSet) -> Results:
        setup = self.setup
        scores_3xP = measure(evaluate, self.state.variables, examples, setup.mesh)["scores"]
        return results(scores_3xP, examples.examples, setup.names)

    def _save(self, evaluation: Results | None) -> None:
        """Save the state; raise NotFiniteError if training could not go on from it.

        The loss of a step is computed before its update, so the loss may be finite when the state is not.
        """
        state = parallel.fetch(self.state)
        if broken := broken_parts(state):
            raise NotFiniteError(self.step, f"the new values of {listed(broken)} are")
        remembered = {
            "epoch": self.setup.epochs(self.step),
            "log": self.log.as_json(),
            "evaluated_on": self.watched.name,
        }
        self.record.checkpoints.save(state, remembered, evaluation)
