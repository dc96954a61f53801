"""A search over knobs: trials with values drawn by Optuna, each a run like any other, and what came of them.

The folder has a directory for each trial, `trial0`, `trial1`, ..., and `search.db`, Optuna's database. Several
processes may search in one folder. Who trains a trial holds the lock `.trial<N>.lock`, which the system releases when
the process ends, however it ends; a trial that is not finished and whose lock is free is resumed, with its values,
before another one begins. Values are drawn while `.lock` is held, by a sampler whose seed depends on the number of the
trial, so that a search that was killed goes on as if it had not been.
"""

import contextlib
import dataclasses
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

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import lock
from ekd_jax.common.log import logger, once
from ekd_jax.common.text import clock
from ekd_jax.config.build import build_networks
from ekd_jax.config.resolve import result_fields, to_dict
from ekd_jax.config.space import Choices, Space, Values, with_values
from ekd_jax.data.dataset import Source
from ekd_jax.runs.evaluation import Results
from ekd_jax.runs.metrics import read_metrics
from ekd_jax.runs.workdir import seed_directory
from ekd_jax.training import plans, search_database, seeds
from ekd_jax.training.comparison import Entry, about, check_entry
from ekd_jax.training.loop import DivergedError, Watch
from ekd_jax.training.search_database import DATABASE, plain_errors

JSON, MARKDOWN = "search.json", "search.md"
SAMPLERS = ("tpe", "random", "grid")
COMPLETE, FAILED, PRUNED, RUNNING = "complete", "failed", "pruned", "not finished"
VALIDATION = "validation"
# Fields of a `Trial` that are attributes in the database.
ATTRIBUTES = ("top1", "std", "seconds", "reason")
MOST_TRIALS = 20  # unless --trials says otherwise
STARTUP_TRIALS = 5  # complete ones, before any is pruned
IMPORTANCE_TRIALS, BEST_SHARE = 20, 0.25  # PED-ANOVA asks for at least five trials among the best


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched, and where.

    Attributes:
        path: directory of the search.
        config: the complete configuration whose knobs the values replace.
        space: which knobs, and their values.
        overridden: dotted names of `config` that the command line set.
        objective: "mean" of the students, "ensemble" or "student_<N>".
        sampler: one of `SAMPLERS`.
        prune: whether trials below the median of the others end early.
    """

    path: pathlib.Path
    config: FrozenConfigDict
    space: Space
    overridden: Sequence[str] = ()
    objective: str = "mean"
    sampler: str = "tpe"
    prune: bool = False

    def settings(self) -> dict[str, Any]:
        """Return what must stay the same as long as the search goes on."""
        fields = result_fields(to_dict(self.config))
        return {
            "config": {name: value for name, value in fields.items() if name not in self.space},
            "space": {knob: values.as_json() for knob, values in self.space.items()},
            "seeds": list(self.config.seeds),
            "objective": self.objective,
            "sampler": self.sampler,
        }

    def grid_size(self) -> int:
        """Return the number of combinations of values; 0 if a range has no step."""
        return math.prod(len(values.listed()) for values in self.space.values())

    def grid_point(self, number: int) -> Values:
        """Return a combination by its number; the last knob changes fastest."""
        point = {}
        for knob, values in reversed(self.space.items()):
            number, place = divmod(number, len(values.listed()))
            point[knob] = values.listed()[place]
        return point

    def directory(self, number: int) -> pathlib.Path:
        """Return the directory of a trial."""
        return self.path / f"trial{number}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A trial of a search.

    Attributes:
        number: from 0, in the order in which they began.
        state: "complete", "failed", "pruned", or "not finished".
        values: the knobs.
        objective: top-1 on the validation images after the last epoch, in per cent; None if it is not complete.
        top1: the same of every student and of the ensemble.
        std: sample standard deviation of the objective over seeds, if there are several.
        seconds: wall-clock of the training that completed, without what an interruption cost.
        reason: why it failed or was pruned.
    """

    number: int
    state: str
    values: Values
    objective: float | None = None
    top1: dict[str, float] = dataclasses.field(default_factory=dict)
    std: float | None = None
    seconds: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has found so far.

    Attributes:
        model, method, data, epochs, validation_examples, seeds: of the configuration.
        objective, sampler, space: of the search.
        trials: complete ones first, the best first; of equal ones the earlier first.
        importance: knob -> share of its importance, the largest first; empty of too few trials.
    """

    model: str
    method: str
    data: str
    epochs: float
    validation_examples: int
    seeds: tuple[int, ...]
    objective: str
    sampler: str
    space: dict[str, Any]
    trials: tuple[Trial, ...]
    importance: dict[str, float]

    @property
    def best(self) -> Trial | None:
        """The best complete trial, None if none is complete."""
        return self.trials[0] if self.trials and self.trials[0].state == COMPLETE else None

    def in_state(self, state: str) -> list[Trial]:
        """Return the trials of one state."""
        return [trial for trial in self.trials if trial.state == state]


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
            _say_begin(_trials(search, study), trial.number, values, total)
            with about(f"trial {trial.number}"):
                outcome = _train(search, study, trial, values, mesh, source)
            _record(search, study, trial, outcome)
            _say_end(_trials(search, study)[0], outcome)


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
    scores = [score(search.objective, top1) for top1 in each]
    return Trial(
        trial.number,
        COMPLETE,
        values,
        objective=statistics.fmean(scores),
        top1={name: statistics.fmean(top1[name] for top1 in each) for name in each[0]},
        std=statistics.stdev(scores) if len(scores) > 1 else None,
        seconds=round(sum(_entry(search, config, run).seconds() for run in runs), 1),
    )


def last_evaluation(path: pathlib.Path) -> dict[str, float]:
    """Return the top-1 of every predictor on the validation images after the last epoch of a complete run.

    Raises:
        UserError: the record is missing.
    """
    found = [record for record in read_metrics(path) if record["split"] == VALIDATION]
    tested = [record["step"] for record in read_metrics(path) if record["split"] == "test"]
    if not found or found[-1]["step"] != max(tested, default=-1):
        raise UserError(
            f"{path} has no record of its last evaluation: delete {path}, and run the same command"
        )
    return {name.removesuffix("/top1"): top1 for name, top1 in found[-1].items() if name.endswith("/top1")}


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
        tops = {
            name.removesuffix("/top1"): top1 for name, top1 in evaluation.items() if name.endswith("/top1")
        }
        value, number = score(search.objective, tops), round(epoch / every)
        with _alone(search.path), plain_errors(search.path / DATABASE):
            if number not in study.get_trials(deepcopy=False)[trial.number].intermediate_values:
                trial.report(value, number)
            if search.prune and trial.should_prune():
                raise PrunedError(
                    f"{value:.2f} at epoch {epoch:g}: its best was below the median of the others"
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


# --- what was found -------------------------------------------------------------------------------


def found(search: Search, study: Any) -> Found:
    """Return what a search has found so far."""
    trials, config = _trials(search, study), search.config
    return Found(
        model=config.model.name,
        method=config.method.name,
        data=config.data.name,
        epochs=config.train.epochs,
        validation_examples=config.data.validation_examples,
        seeds=tuple(config.seeds) or (config.seed,),
        objective=search.objective,
        sampler=search.sampler,
        space={knob: values.as_json() for knob, values in search.space.items()},
        trials=tuple(trials),
        importance=_importance(search, study, trials),
    )


def _trials(search: Search, study: Any) -> list[Trial]:
    """Return all trials in the order of `Found.trials`."""
    with plain_errors(search.path / DATABASE):
        trials = [_trial(search, each) for each in study.get_trials(deepcopy=False)]
    order = (COMPLETE, PRUNED, FAILED, RUNNING)
    return sorted(trials, key=lambda t: (order.index(t.state), -(t.objective or 0.0), t.number))


def _trial(search: Search, stored: Any) -> Trial:
    state = {"COMPLETE": COMPLETE, "FAIL": FAILED, "PRUNED": PRUNED}.get(stored.state.name, RUNNING)
    values = {knob: search.space[knob].restored(value) for knob, value in stored.params.items()}
    attributes = {name: stored.user_attrs[name] for name in ATTRIBUTES if name in stored.user_attrs}
    return Trial(
        stored.number,
        state,
        {knob: values[knob] for knob in search.space if knob in values},
        stored.value if state == COMPLETE else None,
        **attributes,
    )


def _importance(search: Search, study: Any, trials: Sequence[Trial]) -> dict[str, float]:
    """Return how much each knob decides whether a trial is in the best quarter, by PED-ANOVA (Watanabe et al. 2023)."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    objectives = [trial.objective for trial in trials if trial.state == COMPLETE]
    if len(objectives) < IMPORTANCE_TRIALS or len(set(objectives)) == 1 or len(search.space) == 1:
        return {}
    with plain_errors(search.path / DATABASE):
        shares = get_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
        )
    return {knob: round(float(share), 4) for knob, share in shares.items()}


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


def in_words(values: Values) -> str:
    """Return values as "knob=value, ...", with four digits."""
    return ", ".join(f"{knob}={short(value)}" for knob, value in values.items())


def short(value: Any) -> str:
    """Return a value of a knob for people: numbers have four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
