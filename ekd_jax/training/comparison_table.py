"""The table of a comparison: accuracies of all complete runs, and how they differ from the baseline's."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, TypeVar

from scipy.special import stdtrit

from ekd_jax.common.errors import UserError
from ekd_jax.common.spread import spread
from ekd_jax.common.text import human, markdown_table, table
from ekd_jax.runs.records import Result, StudentResult
from ekd_jax.training.comparison import Entry

BASELINE, CONFIDENCE = "baseline", 0.95


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The accuracy of one predictor over seeds.

    Attributes:
        top1: per cent of the test set after the last epoch, one value per seed.
        mean: of these.
        std: their sample standard deviation; None for one seed.
        difference: to the baseline, a mean over the seeds that both have: to its ensemble, or to its student of
            the same number if that has as many parameters, else None.
        interval: 95 % confidence interval of this difference by Student's t, paired by seed; None for one seed.
    """

    top1: tuple[float, ...]
    mean: float
    std: float | None
    difference: float | None = None
    interval: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class StudentAccuracy(Accuracy):
    """The accuracy of a student. `parameters` is a mean where a method searches for the network's widths."""

    student: int = 0
    network: str = ""
    width: str = ""
    parameters: int = 0


Compared = TypeVar("Compared", bound=Accuracy)


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
    """All complete runs of a comparison by label, what they have in common, and the label of the baseline."""

    model: str
    data: str
    epochs: float
    labels: dict[str, Row]
    baseline: str = BASELINE


def compare(runs: list[Entry], baseline: str = BASELINE) -> Comparison:
    """Compare the complete runs.

    Args:
        runs: of all labels.
        baseline: the label that the others are compared with, if it is there.

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
    if base := rows.get(baseline):
        rows = {label: row if row is base else _with_differences(row, base) for label, row in rows.items()}
    config = runs[0].config
    models = ", ".join(dict.fromkeys(run.config.model.name for run in runs))
    return Comparison(models, config.data.name, config.train.epochs, rows, baseline)


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
    found = spread(result.top1_last for result in results)
    return Accuracy(found.values, found.mean, found.std)


def _with_differences(row: Row, base: Row) -> Row:
    places = [(row.seeds.index(seed), base.seeds.index(seed)) for seed in row.seeds if seed in base.seeds]

    def against(own: Compared, its: Accuracy) -> Compared:
        differences = [own.top1[i] - its.top1[j] for i, j in places]
        return dataclasses.replace(own, **paired(differences))

    students = list(row.students)
    for i, (own, its) in enumerate(zip(row.students, base.students, strict=False)):
        if own.parameters == its.parameters:
            students[i] = against(own, its)
    return dataclasses.replace(row, students=tuple(students), ensemble=against(row.ensemble, base.ensemble))


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Return the mean of paired differences and its 95 % confidence interval, as fields of `Accuracy`.

    The interval is mean -+ t s / sqrt(n), with Student's t of n - 1 degrees of freedom and the sample standard
    deviation s; None for one pair. Without a pair nothing is returned.
    """
    n = len(differences)
    if not n:
        return {}
    mean = statistics.fmean(differences)
    if n == 1:
        return {"difference": mean}
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(differences) / n**0.5
    return {"difference": mean, "interval": (mean - half, mean + half)}


def as_text(found: Comparison) -> str:
    """Return the comparison as a table for a terminal; of one label, with a line for each student."""
    if len(found.labels) == 1 and next(iter(found.labels.values())).n > 1:
        return f"{table(*_of_one_label(found))}\n{_explained(found, '+-')}"
    parts = [table(*_rows_and_header(found, "+-")), _explained(found, "+-")]
    if rows := _interval_rows(found):
        parts += ["", table(rows, _interval_header(found)), _about_intervals(found)]
    return "\n".join(parts)


def as_markdown(found: Comparison, command: str) -> str:
    """Return the comparison as a table for a document, with the command that made it."""
    cells = markdown_table(*_rows_and_header(found, "±"))
    text = f"{_explained(found, '±')}.\n\n```\n{command}\n```\n\n{cells}\n"
    if rows := _interval_rows(found):
        text += f"\n{_about_intervals(found)}.\n\n{markdown_table(rows, _interval_header(found))}\n"
    return text


def _of_one_label(found: Comparison) -> tuple[list[list[str]], list[str]]:
    """Return the rows and the header of a table of one label: students x mean, deviation and range."""
    (row,) = found.labels.values()

    def numbers(own: Accuracy) -> list[str]:
        return [f"{own.mean:.2f} +- {own.std or 0:.2f}", f"{min(own.top1):.2f}", f"{max(own.top1):.2f}"]

    rows = [[str(s.student), s.width, f"{s.parameters:,}", *numbers(s)] for s in row.students]
    rows += [
        [name, "", "", *numbers(own)]
        for name, own in [("ensemble teacher", row.ensemble), *row.others.items()]
    ]
    return rows, [f"n = {row.n}", "width", "parameters", "top-1", "least", "most"]


def _interval_rows(found: Comparison) -> list[list[str]]:
    """Return the rows of a table with the intervals of all differences; none if no label has any."""

    def cell(own: Accuracy) -> str:
        if own.difference is None or own.interval is None:
            return ""
        return f"{own.difference:+.2f} [{own.interval[0]:+.2f}, {own.interval[1]:+.2f}]"

    students = _students(found)
    cells = {
        label: [*map(cell, row.students), *[""] * (students - len(row.students)), cell(row.ensemble)]
        for label, row in found.labels.items()
    }
    return [[label, *row] for label, row in cells.items() if any(row)]


def _interval_header(found: Comparison) -> list[str]:
    return [f"minus {found.baseline}", *(f"student {i + 1}" for i in range(_students(found))), "ensemble"]


def _about_intervals(found: Comparison) -> str:
    return f"differences to {found.baseline}, paired by seed, with {CONFIDENCE:.0%} confidence intervals (Student's t)"


def _students(found: Comparison) -> int:
    return max(len(row.students) for row in found.labels.values())


def _rows_and_header(found: Comparison, plus_minus: str) -> tuple[list[list[str]], list[str]]:
    students = _students(found)
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
    if found.baseline in found.labels and len(found.labels) > 1:
        text += (
            f"; in brackets the difference to {found.baseline}, for a student of the same number and size"
        )
    early = [f"{label} {row.stopped} of {row.n}" for label, row in found.labels.items() if row.stopped]
    if early:
        text += f"; runs that stopped early: {', '.join(early)}"
    return text
