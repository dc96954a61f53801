"""The sections of a report that need no images: accuracy, costs, time and curves, from what runs have recorded."""

import dataclasses
from collections.abc import Callable, Sequence

from ekd_jax.common.spread import Spread
from ekd_jax.common.text import clock, human, three_digits
from ekd_jax.runs.benchmarking import read_benchmark
from ekd_jax.runs.describe import width_label
from ekd_jax.runs.report.charts import bar_chart, line_chart
from ekd_jax.runs.report.document import (
    NO_RESULT,
    Figures,
    Missing,
    Part,
    Section,
    Table,
    Text,
    heading,
    listed,
)
from ekd_jax.runs.report.plot import Series
from ekd_jax.runs.report.reading import (
    BASELINE,
    Alone,
    Group,
    PredictorRow,
    baselines,
    curve,
    loss_terms,
    training_times,
)
from ekd_jax.runs.report.shapes import Figure
from ekd_jax.runs.report.statistics import pareto_front
from ekd_jax.students.formats.timing import Measurement


def runs_section(groups: Sequence[Group]) -> Section:
    """Return the table of runs."""
    rows = []
    for group in groups:
        first = group.first
        seconds = [run.seconds for run in group.runs if run.seconds is not None]
        state = "complete"
        if not group.complete:
            planned = f" of {first.steps:,}" if first.steps else ""
            state = f"not complete: step {first.step:,}{planned}"
        elif any(run.summary and run.summary.stopped for run in group.runs):
            state = "complete, stopped early"
        rows.append(
            (
                group.label,
                str(group.run.config.model.name),
                listed([str(run.seed) for run in group.runs]),
                f"{group.epochs:g}",
                state,
                " ".join(map(clock, seconds)) or NO_RESULT,
                listed(list(dict.fromkeys(run.devices or "unknown" for run in group.runs))),
                " ".join(str(run.run.path) for run in group.runs),
            )
        )
    header = ("runs", "network", "seeds", "epochs", "state", "training", "devices", "directories")
    caption = "Runs. Those that differ in their seed alone are one row; training is h:mm:ss of each."
    return Section("runs", "Runs", (Table(caption, header, tuple(rows)),))


def accuracy_section(groups: Sequence[Group]) -> Section:
    """Return accuracies of all predictors beside their baselines and the paper's rows."""
    parts: list[Part] = []
    singles = [group for group in groups if len(group.run.description.students) == 1]
    singles = singles if len(singles) > 1 else []  # one table for all of them
    families = [group for group in groups if group not in singles]
    if len(families) > 1:
        parts += [_side_by_side(families), *_by_student(families)]
    parts += [_accuracies(group, groups) for group in families]
    if singles:
        parts.append(_single_students(singles))
    if all(group.method == BASELINE for group in groups):
        parts.append(Missing("Differences from baselines", "all runs are baselines"))
    elif not any(baselines(group, groups) for group in groups):
        reason = "no run of the method baseline with the same networks and as many epochs is among the runs"
        parts.append(Missing("Differences from baselines", reason))
    if not any(group.paper for group in groups):
        reason = "no run has the method, network, data and students of one of its rows"
        parts.append(Missing("The paper's rows", reason))
    return Section("accuracy", "Accuracy", tuple(parts))


def _side_by_side(groups: Sequence[Group]) -> Table:
    most = max(len(group.run.description.students) for group in groups)
    names = [*(f"student_{i + 1}" for i in range(most)), "ensemble"]
    rows = []
    for group in filter(_tested, groups):
        own = {row.predictor: row for row in group.rows}
        rows.append((group.named, *(_cell(own[name].last) if name in own else "" for name in names)))
    caption = f"Side by side: top-1, per cent of the test set, after the last epoch{_spread_note(groups)}."
    return Table(f"{caption}{_going_note(groups)}", ("runs", *map(heading, names)), tuple(rows))


def _single_students(groups: Sequence[Group]) -> Table:
    rows = []
    for group in filter(_tested, groups):
        (row, *_), (info,) = group.rows, group.run.description.students
        width = width_label(info, group.run.description.model)
        rows.append((group.named, width, f"{info.parameters:,}", _cell(row.last), _cell(row.best)))
    caption = (
        f"Runs of one student: top-1, per cent of the test set, after the last epoch{_spread_note(groups)}."
    )
    header = ("runs", "width", "parameters", "last", "best")
    return Table(f"{caption}{_going_note(groups)}", header, tuple(rows))


def _tested(group: Group) -> bool:
    """Return whether accuracies are of the test set: that is evaluated at the end where images were held out."""
    return group.complete or group.first.watched == "test"


def _going_note(groups: Sequence[Group]) -> str:
    going = [group for group in groups if not group.complete]
    if not going:
        return ""
    hidden = "" if all(map(_tested, going)) else "; those with a validation set have no test accuracy yet"
    return f" Of runs that are not complete, at the latest evaluation{hidden}."


def _by_student(groups: Sequence[Group]) -> list[Part]:
    series = []
    for number, group in enumerate(groups, 1):
        if not _tested(group):
            continue
        points = [
            (float(row.info.student), row.last) for row in group.rows if row.info and row.last is not None
        ]
        if points:
            spreads = tuple(found.std or 0.0 for _, found in points) if len(group.runs) > 1 else ()
            places = tuple((x, found.mean) for x, found in points)
            apart = min(4, 30 / len(groups)) if any(len(g.runs) > 1 for g in groups) else 0.0
            shift = apart * (number - (len(groups) + 1) / 2)
            series.append(Series(group.named, places, number, spreads, shift=shift))
    if not series:
        return []
    title = "Accuracy of each student"
    return [Figures("", (line_chart("accuracy", title, series, ("student", "top-1, per cent")),))]


def _cell(found: Spread | None) -> str:
    return NO_RESULT if found is None else str(found)


def _spread_note(groups: Sequence[Group]) -> str:
    return ", mean ± standard deviation over n seeds" if any(len(g.runs) > 1 for g in groups) else ""


def _accuracies(group: Group, groups: Sequence[Group]) -> Table:
    alone, paper = baselines(group, groups), group.paper
    when = "after the last epoch" if group.complete else "at the latest evaluation, so far"
    header = ["", "width", "parameters", "last", "best"]
    header += ["alone", "difference"] * bool(alone) + ["paper", "paper, alone"] * bool(paper)
    rows = []
    for row in group.rows:
        info = row.info
        cells = [heading(row.predictor)]
        cells += (
            [width_label(info, group.run.description.model), f"{info.parameters:,}"] if info else ["", ""]
        )
        cells += [_cell(row.last), _cell(row.best)]
        if alone:
            cells += _beside(row, alone.get(row.predictor))
        if paper:
            place = info.student - 1 if info else None
            cells += (
                ["", ""] if place is None else [f"{v[place]:.2f}" for v in (paper.ensemble, paper.alone)]
            )
        rows.append(tuple(cells))
    tested = "test" if _tested(group) else "validation"
    watched = "" if group.first.watched == tested else f"; best on the {group.first.watched} set"
    notes = [f"{group.named}: top-1, per cent of the {tested} set, {when}{_spread_note([group])}{watched}."]
    for other in dict.fromkeys(each.group.label for each in alone.values()):
        its = next(each.group for each in alone.values() if each.group.label == other)
        notes.append(f"Alone: {its.named}.")
    if not alone and group.method != BASELINE and any(g.method == BASELINE for g in groups):
        notes.append("No baseline with the same networks and as many epochs.")
    if paper:
        notes.append(
            f"Paper: Table {paper.table}, best of each run, mean of 5, {paper.epochs:g} epochs; these runs train "
            f"{group.epochs:g}."
        )
    return Table(" ".join(notes), tuple(header), tuple(rows))


def _beside(row: PredictorRow, alone: Alone | None) -> list[str]:
    if alone is None or alone.row.last is None or row.last is None:
        return ["", ""]
    return [str(alone.row.last), f"{row.last.mean - alone.row.last.mean:+.2f}"]


Cost = Callable[[Group, PredictorRow], float | None]


def cost_section(groups: Sequence[Group]) -> Section:
    """Return accuracy over parameters, multiply-accumulates, file size and latency, with the Pareto fronts."""
    measured = {group.label: _measurements(group) for group in groups}
    kind = _usual_conditions([m for each in measured.values() for m in each.values()])

    def of_measurement(name: str) -> Cost:
        def cost(group: Group, row: PredictorRow) -> float | None:
            found = measured[group.label].get((row.predictor, *kind)) if kind else None
            return float(getattr(found, name)) if found else None

        return cost

    runtime = (
        f"{kind[0]}, batch {kind[1]}, {kind[2]} thread{'s' * (kind[2] > 1)}, {kind[3]}" if kind else ""
    )
    costs: list[tuple[str, str, Cost]] = [
        ("parameters", "parameters", lambda _, row: row.info.parameters if row.info else None),
        ("macs", "multiply-accumulates", lambda _, row: row.info.macs if row.info else None),
        ("file", f"bytes of the file for {kind[0]}" if kind else "", of_measurement("file_bytes")),
        ("latency", "milliseconds of a call", of_measurement("median_ms")),
    ]
    figures, tables = [], []
    for key, label, cost in costs:
        made = _cost_figure(key, label, cost, groups)
        if made:
            figures.append(made[0])
            tables.append(made[1])
    parts: list[Part] = []
    if figures:
        parts.append(Figures("", tuple(figures)))
        parts.append(
            Text(
                "Points are students. The dotted line joins the Pareto front, whose students have their numbers."
            )
        )
    parts += tables
    if kind:
        parts.append(Text(f"Files and latency: {runtime}, as `ekd benchmark` measured them."))
    elif figures:
        reason = "the runs keep no measurement of their latest checkpoints; `ekd benchmark --workdir=RUN` makes one"
        parts.append(Missing("File size and latency", reason))
    if not figures:
        parts.append(Missing("Accuracy against cost", "no run was evaluated yet"))
    return Section("cost", "Accuracy against cost", tuple(parts))


Kind = tuple[str, int, int, str]


def _measurements(group: Group) -> dict[tuple[str, str, int, int, str], Measurement]:
    """Return what `ekd benchmark` measured of the latest checkpoint of the first run, by network and conditions."""
    return {
        (m.network, m.conditions.runtime, m.batch_size, m.conditions.threads, m.conditions.device): m
        for m in read_benchmark(group.run.path)
        if m.step == group.run.step
    }


def _usual_conditions(found: Sequence[Measurement]) -> Kind | None:
    """Return the runtime, batch size, threads and device that most networks were measured with."""
    kinds = [(m.conditions.runtime, m.batch_size, m.conditions.threads, m.conditions.device) for m in found]
    return max(sorted(set(kinds)), key=lambda kind: (kinds.count(kind), -kind[1]), default=None)


def _cost_figure(key: str, label: str, cost: Cost, groups: Sequence[Group]) -> tuple[Figure, Table] | None:
    points = []  # number of the group, group, row, cost, top-1
    for number, group in enumerate(groups, 1):
        for row in group.rows:
            value = cost(group, row)
            if row.info and row.last and value and _tested(group):
                points.append((number, group, row, value, row.last.mean))
    if not points:
        return None
    front = pareto_front([p[3] for p in points], [p[4] for p in points])
    series = []
    for number in dict.fromkeys(p[0] for p in points):
        own = [p for p in points if p[0] == number]
        numbers = tuple(
            p[2].predictor.removeprefix("student_") if i in front else ""
            for i, p in enumerate(points)
            if p[0] == number
        )
        spreads = (
            tuple((p[2].last.std if p[2].last else 0.0) or 0.0 for p in own)
            if len(own[0][1].runs) > 1
            else ()
        )
        places = tuple((p[3], p[4]) for p in own)
        series.append(Series(own[0][1].named, places, number, spreads, numbers, joined=False))
    joined = [(points[i][3], points[i][4]) for i in front]
    title = f"Top-1 over {label}"
    figure = line_chart(f"cost-{key}", title, series, (label, "top-1, per cent"), log_x=True, front=joined)
    shown = three_digits if key == "latency" else human
    rows = tuple(
        (
            f"{points[i][1].label}, {heading(points[i][2].predictor)}",
            shown(points[i][3]),
            f"{points[i][4]:.2f}",
        )
        for i in front
    )
    return figure, Table(f"Pareto front of top-1 and {label}", ("", label, "top-1"), rows)


def time_section(groups: Sequence[Group]) -> Section:
    """Return the time of one ensemble run against its students' separate runs: the paper's Figure 2b."""
    parts: list[Part] = []
    for number, group in enumerate(groups, 1):
        found = training_times(group, groups)
        bars, figures = [], []
        if found:
            ensemble = found.ensemble.mean
            given = [
                (group.label, ensemble, 1),
                ("alone, in turn", found.in_turn, 2),
                ("alone, in parallel", found.in_parallel, 3),
                ("alone, in one run", found.together.mean if found.together else None, 4),
            ]
            bars = [
                (name, value, color, f"{_seconds(value)} ({value / ensemble:.2f})")
                for name, value, color in given
                if value is not None and ensemble > 0
            ]
        if len(bars) > 1:
            title = f"Time of training: {group.label}"
            unit = "time (relative to the first)"
            figures.append(bar_chart(f"time-{number}", title, bars, unit, "run"))
        if group.paper:
            ours, turn, parallel = group.paper.minutes
            minutes = [
                ("ensemble", ours, 1),
                ("alone, in turn", turn, 2),
                ("alone, in parallel", parallel, 3),
            ]
            shown = [(n, v, c, f"{v:,.0f} ({v / ours:.2f})") for n, v, c in minutes]
            unit = "minutes on GTX 1080 Ti (relative to the first)"
            title = f"Time of training in the paper, Figure 2b: {group.run.config.model.name}"
            figures.append(bar_chart(f"time-paper-{number}", title, shown, unit, "run"))
        if figures:
            parts.append(Figures("", tuple(figures)))
        if found and found.missing:
            reason = (
                f"{_students(found.missing)} of {group.label} would each need a run of the method baseline"
            )
            parts.append(Missing("In turn and in parallel", f"{reason} of {group.epochs:g} epochs"))
        if found and len(found.devices) > 1:
            parts.append(
                Text(f"These runs were not trained on the same devices: {listed(list(found.devices))}.")
            )
    if not any(isinstance(part, Figures) for part in parts):
        reason = (
            "no complete ensemble is among the runs together with baselines of the same networks and epochs"
        )
        parts = [Missing("Time of one ensemble against separate runs", reason)]
    else:
        parts.append(Text("Only training counts: reading, compiling and evaluating do not."))
    return Section("time", "Time of training", tuple(parts))


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else clock(value)


def _students(numbers: Sequence[int]) -> str:
    return f"student{'s' * (len(numbers) > 1)} {listed([str(n) for n in numbers])}"


def curves_section(groups: Sequence[Group]) -> Section:
    """Return accuracy and loss terms over the epochs, for every student."""
    parts: list[Part] = []
    for number, group in enumerate(groups, 1):
        watched = group.first.watched
        figures = [
            _curves(
                group,
                f"curves-{number}-{watched}",
                f"Top-1 on the {watched} set",
                watched,
                "top1",
                "per cent",
            ),
            _curves(
                group, f"curves-{number}-train", "Top-1 on training batches", "train", "top1", "per cent"
            ),
            *(
                _curves(group, f"curves-{number}-{term}", f"Loss term {term}", "train", term, "loss")
                for term in loss_terms(group)
            ),
        ]
        if drawn := [figure for figure in figures if figure]:
            parts.append(Figures(group.named, tuple(drawn)))
        else:
            parts.append(Missing(f"Curves of {group.label}", "it has no records yet"))
    if any(len(group.runs) > 1 for group in groups):
        parts.append(Text("Curves are means over the seeds, at epochs of which every run has a record."))
    return Section("curves", "Training curves", tuple(parts))


def _curves(group: Group, key: str, title: str, split: str, metric: str, unit: str) -> Figure | None:
    series = []
    for number, row in enumerate(group.rows, 1):
        points = [(epoch, found.mean) for epoch, found in curve(group, split, f"{row.predictor}/{metric}")]
        if points and not (metric != "top1" and all(value == 0 for _, value in points)):
            series.append(Series(heading(row.predictor), tuple(points), number if row.info else 0))
    if not series:
        return None
    return line_chart(key, title, series, ("epoch", unit), log_y=metric != "top1")


def run_figures(group: Group) -> list[Figure]:
    """Return the figures of a single run that need no images: curves and costs, under names without numbers."""
    sections = (cost_section([group]), curves_section([group]))
    parts = [part for section in sections for part in section.parts if isinstance(part, Figures)]
    return [
        dataclasses.replace(figure, key=figure.key.replace("curves-1-", "curves-"))
        for part in parts
        for figure in part.figures
    ]
