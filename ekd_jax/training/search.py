"""A search over knobs: trials with values drawn by Optuna, each a run like any other, and what came of them.

The folder has a directory for each trial, `trial0`, `trial1`, ..., and `search.db`, Optuna's database. Several
processes may search in one folder. Who trains a trial holds the lock `.trial<N>.lock`, which the system releases when
the process ends, however it ends; a trial that is not finished and whose lock is free is resumed, with its values,
before another one begins. Values are drawn while `.lock` is held, by a sampler whose seed depends on the number of the
trial, so that a search that was killed goes on as if it had not been.
"""

import contextlib
import gc
import logging
import math
import pathlib
import re
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from ekd_jax.common.errors import UserError, about, reason
from ekd_jax.common.files import lock
from ekd_jax.common.log import logger, once
from ekd_jax.common.spread import spread
from ekd_jax.common.text import clock
from ekd_jax.config.build import build_networks
from ekd_jax.config.space import Choices, Values, with_values
from ekd_jax.data.dataset import Source
from ekd_jax.runs.evaluation import Results
from ekd_jax.runs.metrics import read_metrics
from ekd_jax.runs.workdir import seed_directory
from ekd_jax.training import plans, search_database, seeds
from ekd_jax.training.comparison import Entry, check_entry
from ekd_jax.training.loop import DivergedError, Watch
from ekd_jax.training.search_database import DATABASE, plain_errors
from ekd_jax.training.search_found import (
    ATTRIBUTES,
    COMPLETE,
    FAILED,
    PRUNED,
    RUNNING,
    Found,
    Search,
    Trial,
    found,
    in_words,
    trials_of,
)

SAMPLERS = ("tpe", "random", "grid")
VALIDATION = "validation"
MOST_TRIALS = 20  # unless --trials says otherwise
STARTUP_TRIALS = 5  # complete ones, before any is pruned


class PrunedError(Exception):
    """A trial was ended because it is worse than half of the others so far."""


# --- before anything is written -------------------------------------------------------------------


def check(search: Search) -> None:
    """Find errors that would end the search, as far as they can be known now. Nothing is written.

    Raises:
        UserError: Optuna is missing, there are no validation images, the objective or the grid is not possible, the
            directory holds something else or another search, or the configuration cannot be trained.
    """
    search_database.check_optuna()
    if not search.config.data.validation_examples:
        raise UserError(
            "data.validation_examples=0: a search chooses by images that are neither trained nor tested on: hold some "
            "out, as in --config.data.validation_examples=1000"
        )
    _check_objective(search)
    if search.sampler == "grid":
        for knob, values in search.space.items():
            if not values.listed():
                raise UserError(
                    f"--sampler=grid needs a list of choices or a step for {knob}, which may be {values}"
                )
    if search.prune and search.config.seeds:
        raise UserError(
            f"--prune compares evaluations while a run trains, and config.seeds={search.config.seeds} trains several "
            f"in turn: leave one out"
        )
    _check_directory(search)
    check_entry(_entry(search, search.config, search.path), [])


def _check_objective(search: Search) -> None:
    if search.objective in ("mean", "ensemble"):
        return
    number = re.fullmatch(r"student_([1-9]\d*)", search.objective)
    if not number:
        raise UserError(
            f"--objective={search.objective} must be mean, ensemble, or student_1, student_2, ..."
        )
    chosen = search.space.get("model.students")
    numbers = chosen.values if isinstance(chosen, Choices) else (chosen.low,) if chosen else ()
    variants: list[Values] = [{"model.students": number} for number in numbers]
    for values in variants or [{}]:
        config = with_values(search.config, values, search.overridden)
        students = build_networks(config, num_classes=1, input_shape=(1, 1, 1)).students
        if int(number[1]) > students:
            of = f" with model.students={values['model.students']}" if values else ""
            raise UserError(f"--objective={search.objective}: there are students 1 to {students}{of}")


def _check_directory(search: Search) -> None:
    path = search.path
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir={path} is not a directory: choose another")
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    if DATABASE in names:
        search_database.check_settings(search_database.load(path / DATABASE), search.settings(), path)
        return
    own = re.compile(rf"\.lock|\.{DATABASE}\.\d+.*")
    if others := [name for name in names if not own.fullmatch(name)]:
        raise UserError(
            f"--workdir={path} holds other files ({', '.join(others[:3])}) and no {DATABASE}: choose an empty or new "
            f"directory"
        )


def _entry(search: Search, config: FrozenConfigDict, path: pathlib.Path) -> Entry:
    return Entry(search.path.name, path, config, {})


# --- trials ---------------------------------------------------------------------------------------


def run(
    search: Search, trials: int | None = None, mesh: Mesh | None = None, source: Source | None = None
) -> Found:
    """Train trials until there are as many as asked for, and return what was found.

    Args:
        search: what is searched.
        trials: how many in total, those of earlier calls and other processes included; if not given, all of a grid,
            otherwise 20.
        mesh, source: as for `single.run`.

    Raises:
        UserError: as `check`, or a run ended for a reason that is not in the values of its trial.
        Interrupted: a signal came; a checkpoint was saved.
    """
    check(search)
    database = search.path / DATABASE
    most = search.grid_size() if search.sampler == "grid" else trials or MOST_TRIALS
    total = min(most, trials or most)
    search.path.mkdir(parents=True, exist_ok=True)
    with _alone(search.path):
        if not database.exists():
            search_database.create(database, search.settings())
    study = search_database.load(database)
    search_database.check_settings(study, search.settings(), search.path)
    while True:
        with contextlib.ExitStack() as held:
            taken = _next(search, study, total, held)
            if taken is None:
                return found(search, study)
            trial, values = taken
            _say_begin(trials_of(search, study), trial.number, values, total)
            with about(f"trial {trial.number}"):
                outcome = _train(search, study, trial, values, mesh, source)
            _record(search, study, trial, outcome)
            _say_end(trials_of(search, study)[0], outcome)


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Wait until no other process draws values or records a result."""
    with open(path / ".lock", "w") as file:
        if not lock(file, wait=True):
            once(
                logging.WARNING,
                f"warning: the file system of {path} has no locks: make sure that one process alone searches there",
            )
        yield


def _next(search: Search, study: Any, total: int, held: contextlib.ExitStack) -> tuple[Any, Values] | None:
    """Return the next trial that nobody trains, and its values; None if there is none left.

    One that is not finished comes before a new one.

    Args:
        search, study: the search and its database.
        total: how many trials there may be.
        held: what releases the trial again.
    """
    import optuna

    with _alone(search.path), plain_errors(search.path / DATABASE):
        trials = study.get_trials(deepcopy=False)
        for old in trials[:total]:
            if not old.state.is_finished() and _hold(search.path, old.number, held):
                study.sampler = _sampler(search, old.number)
                return _drawn(search, optuna.Trial(study, old._trial_id))
        number = len(trials)
        if number >= total or not _hold(search.path, number, held):
            return None
        study.sampler = _sampler(search, number)
        return _drawn(search, study.ask())


def _hold(path: pathlib.Path, number: int, held: contextlib.ExitStack) -> bool:
    """Lock a trial until `held` is closed; return False if another process has locked it."""
    file = held.enter_context(open(path / f".trial{number}.lock", "w"))
    try:
        lock(file)
    except BlockingIOError:
        return False
    return True


def _sampler(search: Search, number: int) -> Any:
    """Return Optuna's sampler of the values of one trial."""
    from optuna import samplers

    seed = int(np.random.SeedSequence([search.config.seed, number]).generate_state(1)[0])
    if search.sampler == "tpe":
        return samplers.TPESampler(seed=seed)
    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    point = {knob: search.space[knob].stored(value) for knob, value in search.grid_point(number).items()}
    return samplers.PartialFixedSampler(point, samplers.RandomSampler(seed=seed))


def _drawn(search: Search, trial: Any) -> tuple[Any, Values]:
    """Return the trial with its values; those that are not in the database yet are drawn."""
    return trial, {knob: values.suggest(trial, knob) for knob, values in search.space.items()}


def _train(
    search: Search, study: Any, trial: Any, values: Values, mesh: Mesh | None, source: Source | None
) -> Trial:
    """Train a trial to its end, and return what came of it.

    Raises:
        UserError: the reason is not in the values of the trial.
        Interrupted: a signal came; a checkpoint was saved.
    """
    path = search.directory(trial.number)

    def ended(state: str, why: str) -> Trial:
        return Trial(trial.number, state, values, reason=why)

    try:
        config = with_values(search.config, values, search.overridden)
        check_entry(_entry(search, config, path), [])
    except UserError as error:
        check_entry(_entry(search, search.config, search.path), [])  # raises if no values are to blame
        return ended(FAILED, str(error))
    try:
        if config.seeds:
            seeds.run(config, path, mesh, source)
        else:
            plans.run(config, path, mesh, source, watch=_watch(search, study, trial, config))
    except PrunedError as error:
        return ended(PRUNED, str(error))
    except DivergedError as error:
        return ended(FAILED, str(error.__cause__ or error))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return ended(FAILED, f"it does not fit into memory: {reason(error)}")
    finally:
        gc.collect()  # compiled programs are part of reference cycles
    runs = [seed_directory(path, seed) for seed in config.seeds] or [path]
    each = [last_evaluation(run) for run in runs]
    scores = spread(score(search.objective, top1) for top1 in each)
    return Trial(
        trial.number,
        COMPLETE,
        values,
        objective=scores.mean,
        top1={name: statistics.fmean(top1[name] for top1 in each) for name in each[0]},
        std=scores.std,
        seconds=round(sum(_entry(search, config, run).seconds() for run in runs), 1),
    )


def last_evaluation(path: pathlib.Path) -> dict[str, float]:
    """Return the top-1 of every predictor on the validation images after the last epoch of a complete run.

    Raises:
        UserError: the record is missing.
    """
    records = read_metrics(path)
    found = [record for record in records if record["split"] == VALIDATION]
    tested = [record["step"] for record in records if record["split"] == "test"]
    if not found or found[-1]["step"] != max(tested, default=-1):
        raise UserError(
            f"{path} has no record of its last evaluation: delete {path}, and run the same command"
        )
    return _top1(found[-1])


def _top1(record: Results) -> Results:
    """Return the top-1 of every predictor by its name, of a record of metrics."""
    return {name.removesuffix("/top1"): value for name, value in record.items() if name.endswith("/top1")}


def score(objective: str, top1: Results) -> float:
    """Return what a search maximizes, of the top-1 of every predictor.

    Raises:
        UserError: there is no such predictor, since other values of the space have other ones.
    """
    if objective == "mean":
        return statistics.fmean(value for name, value in top1.items() if name.startswith("student_"))
    if objective not in top1:
        raise UserError(f"--objective={objective}: with these values there is {', '.join(top1)}")
    return top1[objective]


def _watch(search: Search, study: Any, trial: Any, config: FrozenConfigDict) -> Watch:
    """Return what records each evaluation of a trial, and ends it if it is hopeless and the search prunes."""
    from optuna.pruners import MedianPruner

    every = config.train.evaluate_every_epochs
    # Before the learning rate has dropped, accuracy tells little of the end.
    study.pruner = MedianPruner(STARTUP_TRIALS, n_warmup_steps=math.ceil(config.train.epochs / every / 2))

    def watch(epoch: float, evaluation: Results) -> None:
        value, number = score(search.objective, _top1(evaluation)), round(epoch / every)
        with _alone(search.path), plain_errors(search.path / DATABASE):
            if number not in study.get_trials(deepcopy=False)[trial.number].intermediate_values:
                trial.report(value, number)
            if search.prune and trial.should_prune():
                raise PrunedError(
                    f"{value:.2f} at epoch {epoch:.2f}: its best was below the median of the others"
                )

    return watch


def _record(search: Search, study: Any, trial: Any, outcome: Trial) -> None:
    """Write what came of a trial into the database."""
    from optuna.trial import TrialState

    states = {COMPLETE: TrialState.COMPLETE, FAILED: TrialState.FAIL, PRUNED: TrialState.PRUNED}
    with _alone(search.path), plain_errors(search.path / DATABASE):
        for name in ATTRIBUTES:
            if value := getattr(outcome, name):
                trial.set_user_attr(name, value)
        study.tell(trial.number, outcome.objective, states[outcome.state])
    (search.path / f".trial{trial.number}.lock").unlink(missing_ok=True)


def _say_begin(trials: Sequence[Trial], number: int, values: Values, total: int) -> None:
    took = [trial.seconds for trial in trials if trial.seconds]
    left = total - sum(trial.state != RUNNING for trial in trials)
    remaining = f", about {clock(left * statistics.fmean(took))} left" if took else ""
    logger.info(f"trial {number} ({len(trials)} of {total} begun{remaining}): {in_words(values)}")


def _say_end(best: Trial, outcome: Trial) -> None:
    if outcome.objective is None:
        logger.info(f"trial {outcome.number} {outcome.state}: {outcome.reason}")
    else:
        logger.info(
            f"trial {outcome.number}: {outcome.objective:.2f}; the best is trial {best.number} with "
            f"{best.objective:.2f}"
        )
