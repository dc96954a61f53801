"""The report of a run: its log, its lines on the terminal and its summary."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.progress import Progress
from ekd_jax.common.text import clock, human, table
from ekd_jax.config.resolve import identity
from ekd_jax.runs.describe import width_label
from ekd_jax.runs.records import EarlyStop, Result, StudentResult, Summary
from ekd_jax.training.setup import Setup
from ekd_jax.training.tally import Tally

Best = dict[str, dict[str, float]]


@dataclasses.dataclass
class Log:
    """The log of a run, saved with every checkpoint beside the training state.

    Attributes:
        tally: metrics, added up since the last training record; on the devices while training.
        recorded: step of that record.
        evaluated: step of the last evaluation on the watched set.
        skipped: number of steps that were skipped before that record.
        window: seconds of training since then.
        waited: seconds of these in which devices waited for images.
        last: metrics of the latest evaluation on the test set.
        best: name of a predictor -> its best top-1 of all evaluations, and the step of it.
        seconds: wall-clock so far, by what was done.
        execution: how branches run.
        stopped: step at which the run ended early; 0 if it did not.
    """

    tally: Tally
    recorded: int = 0
    evaluated: int = 0
    skipped: int = 0
    window: float = 0.0
    waited: float = 0.0
    last: dict[str, float] = dataclasses.field(default_factory=dict)
    best: Best = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"read": 0.0, "compile": 0.0, "train": 0.0, "evaluate": 0.0}
    )
    execution: str = ""
    stopped: int = 0

    @classmethod
    def from_json(cls, remembered: dict[str, Any], zero: Tally) -> "Log":
        """Return the log that `as_json` wrote.

        Args:
            remembered: what it returned.
            zero: the tally of no step; it tells which metrics there are.

        Raises:
            UserError: it was written by another version.
        """
        try:
            log = cls(**remembered)
            sums, skipped = remembered["tally"]["sums"], remembered["tally"]["skipped"]
        except (TypeError, KeyError) as error:
            raise UserError(
                f"the checkpoint is of another version of ekd_jax ({reason(error)}): train on with that version"
            ) from error
        sums = {name: sums.get(name, value) for name, value in zero.sums.items()}
        return dataclasses.replace(log, tally=Tally.of(sums, skipped))

    def as_json(self) -> dict[str, Any]:
        """Return the log as numbers, strings and dicts."""
        tally: Tally = jax.device_get(self.tally)
        sums = {name: float(value) for name, value in tally.sums.items()}
        return {**vars(self), "tally": {"sums": sums, "skipped": int(tally.skipped)}}


def best_of(best: Best, evaluation: Mapping[str, float], step: int, names: Sequence[str]) -> Best:
    """Return the best top-1 of every predictor, after one more evaluation; of equal ones the first."""
    new = dict(best)
    for name in names:
        top1 = evaluation[f"{name}/top1"]
        if name not in best or top1 > best[name]["top1"]:
            new[name] = {"top1": top1, "step": step}
    return new


def early_stop(setup: Setup, best: int, step: int) -> EarlyStop | None:
    """Return why a run ends at a step that was just evaluated, None if it does not end early.

    It ends if the ensemble's top-1 on the watched set was best `train.patience_epochs` ago or earlier. The best is
    part of the log, so a run that resumes ends at the same step.

    Args:
        setup: of the run.
        best: the step at which the ensemble was best.
        step: that was just evaluated.
    """
    patience = setup.config.train.patience_epochs
    if not patience or step == setup.steps or step - best < setup.steps_in(patience):
        return None
    return EarlyStop(step, setup.steps, best, patience)


def early_stop_line(stop: EarlyStop) -> str:
    """Return one line that says when and why a run ended early."""
    return (
        f"stopped early at step {stop.step:,} of {stop.planned_steps:,}: the ensemble's top-1 on the validation "
        f"set was best at step {stop.best_step:,} (train.patience_epochs={stop.patience_epochs:g})"
    )


def train_line(setup: Setup, step: int, means: dict[str, float], progress: Progress) -> str:
    """Return one line with the means of the metrics since the last record."""
    top1 = " ".join(f"{means[f'{name}/top1']:.1f}" for name in setup.trained_names)
    return (
        f"step {step:,}/{setup.steps:,}  epoch {setup.epochs(step):.2f}  loss {means['loss']:.4f}  "
        f"train top-1 {top1}  {means['images/s']:,.0f} images/s  {progress.remaining()} left"
    )


def evaluation_line(split: str, epoch: float, evaluation: dict[str, float], names: Sequence[str]) -> str:
    """Return one line with the top-1 accuracies of an evaluation."""
    top1 = "  ".join(f"{name} {evaluation[f'{name}/top1']:.2f}" for name in names)
    return f"{split}, epoch {epoch:.2f}  top-1  {top1}"


def summarize(setup: Setup, log: Log) -> Summary:
    """Return the summary of a run that is complete."""

    def result(name: str) -> dict[str, Any]:
        best = log.best[name]
        return {
            "top1_last": log.last[f"{name}/top1"],
            "top1_best": best["top1"],
            "best_step": int(best["step"]),
        }

    best_step = int(log.best["ensemble"]["step"])
    stopped = early_stop(setup, best_step, log.stopped) if log.stopped else None
    students = setup.description.students
    others = [n for n in setup.names if n != "ensemble" and not n.startswith("student_")]
    return Summary(
        **identity(setup.config),
        steps=log.stopped or setup.steps,
        epochs=round(setup.epochs(log.stopped), 4) if log.stopped else setup.config.train.epochs,
        seconds={name: round(value, 1) for name, value in log.seconds.items()},
        best_on=setup.watched,
        method_parameters=setup.description.method_parameters,
        students=tuple(StudentResult(**vars(s), **result(f"student_{s.student}")) for s in students),
        ensemble=Result(**result("ensemble")),
        others={name: Result(**result(name)) for name in others},
        stopped=stopped,
    )


def summary_table(summary: Summary) -> str:
    """Return the students of a complete run as a table for a terminal."""

    def row(*cells: str, result: Result | StudentResult) -> list[str]:
        return [*cells, f"{result.top1_last:.2f}", f"{result.top1_best:.2f}"]

    rows = [
        row(
            str(s.student),
            width_label(s, summary.model),
            f"{s.parameters:,}",
            f"{100 * s.ratio:.1f}",
            human(s.macs),
            result=s,
        )
        for s in summary.students
    ]
    for name, result in [("ensemble teacher", summary.ensemble), *summary.others.items()]:
        rows.append(row(name, "", "", "", "", result=result))
    header = ["student", "width", "parameters", "% of 1", "MACs", "top-1 last", "top-1 best"]
    spent = ", ".join(f"{name} {clock(seconds)}" for name, seconds in summary.seconds.items())
    early = f"{early_stop_line(summary.stopped)}\n" if summary.stopped else ""
    return (
        f"{table(rows, header)}\n{early}"
        f"top-1 last: per cent of the test set after the last epoch (the result); top-1 best: of the "
        f"{summary.best_on} set at the best evaluation\n{spent}"
    )
