"""The table of a comparison: accuracies of all complete runs, and how they differ from the baseline's."""

import dataclasses
import statistics
from collections.abc import Sequence

from ekd_jax.common.errors import UserError
from ekd_jax.common.text import human, table
from ekd_jax.runs.records import Result, StudentResult
from ekd_jax.training.comparison import Entry

BASELINE = "baseline"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The accuracy of one predictor over seeds.

    Attributes:
        top1: per cent of the test set after the last epoch, one value per seed.
        mean: of these.
        std: their sample standard deviation; None for one seed.
        difference: of the mean to that of the label "baseline": to its ensemble, or to its student of the same
            number if that has as many parameters, else None.
    """

    top1: tuple[float, ...]
    mean: float
    std: float | None
    difference: float | None = None


@dataclasses.dataclass(frozen=True)
class StudentAccuracy(Accuracy):
    """The accuracy of a student. `parameters` is a mean where a method searches for the network's widths."""

    student: int = 0
    network: str = ""
    width: str = ""
    parameters: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """The complete runs of a label.

    Attributes:
        method: the training method.
        n: how many runs there are.
        seeds: of these runs.
        seconds: wall-clock of each, earlier runs of its plan included.
        students, ensemble, others: what predicts.
        stopped: how many of the runs ended early (`train.patience_epochs`).
    """

    method: str
    n: int
    seeds: tuple[int, ...]
    seconds: tuple[float, ...]
    students: tuple[StudentAccuracy, ...]
    ensemble: Accuracy
    others: dict[str, Accuracy]
    stopped: int = 0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All complete runs of a comparison by label, and what they have in common."""

    model: str
    data: str
    epochs: float
    labels: dict[str, Row]


def compare(runs: list[Entry]) -> Comparison:
    """Compare the complete runs.

    Raises:
        UserError: none is complete.
    """
    rows: dict[str, Row] = {}
    for label in dict.fromkeys(run.label for run in runs):
        if done := [run for run in runs if run.label == label and run.complete]:
            rows[label] = _row(done)
    if not rows:
        directory = runs[0].path.parent.parent
        raise UserError(f"no run in {directory} is complete: train first, without --report")
    if base := rows.get(BASELINE):
        rows = {label: row if row is base else _with_differences(row, base) for label, row in rows.items()}
    config = runs[0].config
    return Comparison(config.model.name, config.data.name, config.train.epochs, rows)


def _row(runs: Sequence[Entry]) -> Row:
    summaries = [run.summary() for run in runs]
    students = zip(*(s.students for s in summaries), strict=True)
    return Row(
        method=summaries[0].method,
        n=len(runs),
        seeds=tuple(run.config.seed for run in runs),
        seconds=tuple(round(run.seconds(), 1) for run in runs),
        students=tuple(
            StudentAccuracy(
                **vars(_accuracy(each)),
                student=each[0].student,
                network=each[0].network,
                width=each[0].width,
                parameters=round(statistics.fmean(s.parameters for s in each)),
            )
            for each in students
        ),
        ensemble=_accuracy([s.ensemble for s in summaries]),
        others={name: _accuracy([s.others[name] for s in summaries]) for name in summaries[0].others},
        stopped=sum(s.stopped is not None for s in summaries),
    )


def _accuracy(results: Sequence[Result | StudentResult]) -> Accuracy:
    top1 = tuple(result.top1_last for result in results)
    return Accuracy(top1, statistics.fmean(top1), statistics.stdev(top1) if len(top1) > 1 else None)


def _with_differences(row: Row, base: Row) -> Row:
    students = list(row.students)
    for i, (own, its) in enumerate(zip(row.students, base.students, strict=False)):
        if own.parameters == its.parameters:
            students[i] = dataclasses.replace(own, difference=own.mean - its.mean)
    ensemble = dataclasses.replace(row.ensemble, difference=row.ensemble.mean - base.ensemble.mean)
    return dataclasses.replace(row, students=tuple(students), ensemble=ensemble)


def as_text(found: Comparison) -> str:
    """Return the comparison as a table for a terminal."""
    return f"{table(*_rows_and_header(found, '+-'))}\n{_explained(found, '+-')}"


def as_markdown(found: Comparison, command: str) -> str:
    """Return the comparison as a table for a document, with the command that made it."""
    rows, header = _rows_and_header(found, "±")
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    cells = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_explained(found, '±')}.\n\n```\n{command}\n```\n\n{cells}\n"


def _rows_and_header(found: Comparison, plus_minus: str) -> tuple[list[list[str]], list[str]]:
    students = max(len(row.students) for row in found.labels.values())
    numbers = {row.n for row in found.labels.values()}

    def cell(result: Accuracy) -> str:
        spread = "" if result.std is None else f" {plus_minus} {result.std:.2f}"
        change = "" if result.difference is None else f" ({result.difference:+.2f})"
        return f"{result.mean:.2f}{spread}{change}"

    rows = [
        [
            label if len(numbers) == 1 else f"{label} (n = {row.n})",
            *map(cell, row.students),
            *[""] * (students - len(row.students)),
            cell(row.ensemble),
            " ".join(human(student.parameters) for student in row.students),
        ]
        for label, row in found.labels.items()
    ]
    number = f"n = {numbers.pop()}" if len(numbers) == 1 else ""
    return rows, [number, *(f"student {i + 1}" for i in range(students)), "ensemble", "parameters"]


def _explained(found: Comparison, plus_minus: str) -> str:
    text = (
        f"{found.model} on {found.data}, {found.epochs:g} epochs: top-1 after the last epoch, per "
        f"cent of the test set"
    )
    if any(row.n > 1 for row in found.labels.values()):
        text += f", mean {plus_minus} standard deviation of n seeds"
    if BASELINE in found.labels and len(found.labels) > 1:
        text += f"; in brackets the difference to {BASELINE}, for a student of the same number and size"
    early = [f"{label} {row.stopped} of {row.n}" for label, row in found.labels.items() if row.stopped]
    if early:
        text += f"; runs that stopped early: {', '.join(early)}"
    return text
