"""A search and its trials, as records; trials are read from its database."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import FrozenConfigDict

from ekd_jax.config.resolve import result_fields, to_dict
from ekd_jax.config.space import Space, Values
from ekd_jax.training.search_database import DATABASE, plain_errors

JSON, MARKDOWN = "search.json", "search.md"
COMPLETE, FAILED, PRUNED, RUNNING = "complete", "failed", "pruned", "not finished"
# Fields of a `Trial` that are attributes in the database.
ATTRIBUTES = ("top1", "std", "seconds", "reason")
IMPORTANCE_TRIALS, BEST_SHARE = 20, 0.25  # PED-ANOVA asks for at least five trials among the best


@dataclasses.dataclass(frozen=True)
class Search:
    """A search: its space, its objective and its directory.

    Attributes:
        path: directory of the search.
        config: the complete configuration whose knobs the values replace.
        space: which knobs, and their values.
        overridden: dotted names of `config` that the command line set.
        objective: "mean" of the students, "ensemble" or "student_<N>".
        sampler: "tpe", "random" or "grid".
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
        seconds: wall-clock of its runs, as their summaries have it.
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
    """The trials of a search so far.

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


def found(search: Search, study: Any) -> Found:
    """Return what a search has found so far."""
    trials, config = trials_of(search, study), search.config
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


def trials_of(search: Search, study: Any) -> list[Trial]:
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


def in_words(values: Values) -> str:
    """Return values as "knob=value, ...", with four digits."""
    return ", ".join(f"{knob}={short(value)}" for knob, value in values.items())


def short(value: Any) -> str:
    """Return a value of a knob for people: numbers have four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
