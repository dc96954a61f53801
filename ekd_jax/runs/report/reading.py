"""The runs of a report, read back and sorted: those that differ in their seed alone belong together."""

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ekd_jax.common.errors import UserError
from ekd_jax.common.spread import Spread, spread
from ekd_jax.config.resolve import read_config, result_fields, steps_in, to_dict
from ekd_jax.methods.base import EARLIER
from ekd_jax.runs.benchmarking import pinned
from ekd_jax.runs.metrics import METRICS, read_metrics
from ekd_jax.runs.records import A_RUN, CONFIG, SUMMARY, StudentInfo, Summary
from ekd_jax.runs.report.paper import PaperRow, paper_row
from ekd_jax.runs.run import Run, load_run
from ekd_jax.runs.workdir import read_environments, read_summary, seed_runs

BASELINE = "baseline"
SOURCES = ("method.teachers", "model.initial_weights")  # knobs that name other runs
SHOWN_KNOBS = 3  # in a label


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """A run of a report; it may still be training.

    Attributes:
        run: with the checkpoint that was its latest when it was read; None until there is one.
        summary: None until the run is complete.
        records: of its metrics, in order.
        devices: on which it was started last, as `environment.json` has it.
    """

    run: Run
    summary: Summary | None
    records: tuple[dict[str, Any], ...]
    devices: str

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.run.config.seed)

    @property
    def step(self) -> int:
        """The last step of which there is a record."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def steps(self) -> int:
        """How many steps the run will take; 0 where its data was not opened yet."""
        config, data = self.run.config, self.run.description.data
        return steps_in(config.train.epochs, config, data.train_examples) if data else 0

    @property
    def watched(self) -> str:
        """The set that is evaluated while the run trains: "validation" if images were held out, else "test"."""
        return "validation" if self.run.config.data.validation_examples else "test"

    @property
    def seconds(self) -> float | None:
        """Seconds of training, earlier runs of its plan included, compiling not; None until it is complete."""
        if self.summary is None:
            return None
        earlier = [read_summary(file.parent) for file in self.run.path.glob(f"{EARLIER}/*/{SUMMARY}")]
        return sum(own.seconds.get("train", 0.0) for own in (self.summary, *earlier))

    def top1(self, predictor: str) -> tuple[float, float] | None:
        """Return top-1 in per cent, last and best, of a predictor; None before the first evaluation.

        The last is of the test set, except in a run that is not complete and has held images out: those are what it
        evaluates (`watched`).
        """
        if self.summary is not None:
            results = {f"student_{s.student}": s for s in self.summary.students}
            found: Any = {**results, "ensemble": self.summary.ensemble, **self.summary.others}[predictor]
            return found.top1_last, found.top1_best
        name = f"{predictor}/top1"
        values = [r[name] for r in self.records if r["split"] == self.watched and name in r]
        return (values[-1], max(values)) if values else None


@dataclasses.dataclass(frozen=True)
class PredictorRow:
    """A line of the table of accuracies.

    Attributes:
        predictor: "student_1", ..., "ensemble".
        info: the student; None for what is no student.
        last, best: top-1 in per cent over the seeds, after the last epoch and at the best evaluation; None before the
            first evaluation.
    """

    predictor: str
    info: StudentInfo | None
    last: Spread | None
    best: Spread | None


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; one that is still training is a group of its own.

    Attributes:
        label: what tells it from the other groups.
        runs: by seed.
    """

    label: str
    runs: tuple[ReportedRun, ...]

    @property
    def first(self) -> ReportedRun:
        """The run with the smallest seed."""
        return self.runs[0]

    @property
    def run(self) -> Run:
        """The first run, read back."""
        return self.first.run

    @property
    def named(self) -> str:
        """The label, and how many runs there are if several."""
        return f"{self.label}, n = {len(self.runs)}" if len(self.runs) > 1 else self.label

    @property
    def complete(self) -> bool:
        """Whether the runs were trained to their end."""
        return self.first.summary is not None

    @property
    def method(self) -> str:
        """The training method."""
        return str(self.run.config.method.name)

    @property
    def epochs(self) -> float:
        """How many epochs the runs train."""
        return float(self.run.config.train.epochs)

    @cached_property
    def paper(self) -> PaperRow | None:
        """The paper's numbers, if the method and the setting are the paper's."""
        return paper_row(self.run.config) if self.method == "oem" else None

    @cached_property
    def rows(self) -> tuple[PredictorRow, ...]:
        """Every predictor with its accuracy: the students first, then the ensemble and others."""
        infos: Mapping[str, StudentInfo] = {
            f"student_{s.student}": s for s in self.run.description.students
        }
        others = [name for name in self.first.summary.others] if self.first.summary else []
        names = [*infos, "ensemble", *(name for name in others if name not in infos)]
        if len(infos) == 1 and not others:
            names = [*infos]
        return tuple(self._row(name, infos.get(name)) for name in names)

    def _row(self, name: str, info: StudentInfo | None) -> PredictorRow:
        found = [top1 for run in self.runs if (top1 := run.top1(name))]
        if not found:
            return PredictorRow(name, info, None, None)
        last, best = (spread(values) for values in zip(*found, strict=True))
        return PredictorRow(name, info, last, best)


def find_runs(given: Sequence[str]) -> list[pathlib.Path]:
    """Return the directories of runs: those that are given, and those inside a comparison, several seeds, or a plan.

    Raises:
        UserError: a directory is no run and holds none, or is given twice.
    """
    paths: list[pathlib.Path] = []
    for name in given:
        path = pathlib.Path(name)
        inside = [path] if (path / CONFIG).exists() else _runs_inside(path)
        if not inside:
            kind = f"has no {CONFIG}, and holds no runs" if path.is_dir() else "is no directory"
            raise UserError(
                f"{path} is not {A_RUN}: it {kind}: pass the --workdir of `ekd train` or `ekd compare`"
            )
        paths += inside
    seen: dict[pathlib.Path, pathlib.Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"{path} is given twice: pass each run once")
        seen[path.resolve()] = path
    return paths


def _runs_inside(path: pathlib.Path) -> list[pathlib.Path]:
    """Return the runs of several seeds, of a comparison, or of a plan whose last run has not begun."""
    folders = [path, *sorted(file for file in path.glob("*") if file.is_dir())]
    runs = [run for folder in folders for run in seed_runs(folder).values()]
    runs = runs or [file.parent for file in sorted(path.glob(f"{EARLIER}/*/{CONFIG}"))]
    return [inside for run in runs for inside in ([run] if (run / CONFIG).exists() else _runs_inside(run))]


def read_groups(paths: Sequence[pathlib.Path]) -> list[Group]:
    """Read runs back, and sort them into groups in the order of their first runs.

    Runs of one label of a comparison belong together, although the widths that a method finds may differ by seed.
    Runs of the method `baseline` that a plan trained first (`earlier/NAME`) come along.

    Raises:
        UserError: a directory is no run or of another version; runs are of different data; two runs are the same.
    """
    runs = [read_run(path) for path in paths]
    for other in runs[1:]:
        check_same_data(runs[0], other)
    for path in paths:
        for config in sorted(path.glob(f"{EARLIER}/*/{CONFIG}")):
            earlier = read_run(config.parent)
            if earlier.run.config.method.name == BASELINE:
                runs.append(earlier)
    by_key: dict[str, list[ReportedRun]] = {}
    for number, run in enumerate(runs):
        key = str(run.run.path.parent.resolve()) if compared_as(run.run.path) else _key(run.run)
        own = by_key.setdefault(f"{key} {run.summary is not None or run.seed}", [])
        same = next((other for other in own if other.seed == run.seed), None)
        if same is None:
            own.append(run)
        elif number < len(paths):
            raise UserError(
                f"{same.run.path} and {run.run.path} are the same run, seed {run.seed}: they would count as two seeds: "
                f"pass one of them"
            )
    groups = [tuple(sorted(group, key=lambda each: each.seed)) for group in by_key.values()]
    return [Group(label, group) for label, group in zip(_labels(groups), groups, strict=True)]


def read_run(path: pathlib.Path) -> ReportedRun:
    """Read a run back; it may still be training.

    Raises:
        UserError: it is not the directory of a run, is damaged, or is of another version.
    """
    run = load_run(path)
    with contextlib.suppress(UserError):  # a run that has just begun has no checkpoint
        run = pinned(run)
    summary = read_summary(path) if (path / SUMMARY).exists() else None
    records = read_metrics(path) if (path / METRICS).exists() else []
    environments = read_environments(path)
    devices = str(environments[-1].get("devices", "")) if environments else ""
    return ReportedRun(run, summary, tuple(records), devices)


def check_same_data(first: ReportedRun, other: ReportedRun) -> None:
    """Raise UserError unless two runs were tested on the same images of the same classes."""
    pairs = [
        (f"data.{name}", each)
        for name in ("name", "test_split")
        for each in [tuple(run.run.config.data[name] for run in (first, other))]
    ]
    pairs.append(("the classes", (first.run.description.class_names, other.run.description.class_names)))
    tested = [run.run.description.data for run in (first, other)]
    if all(tested):
        pairs.append(("test images", tuple(data.test_examples for data in tested if data)))
    for what, (there, here) in pairs:
        if there != here:
            values = "" if what == "the classes" else f" ({there or 'default'} and {here or 'default'})"
            raise UserError(
                f"{first.run.path} and {other.run.path} are of different data: {what} differ{'s' * (what[-1] != 's')}"
                f"{values}; make a report for each"
            )


def compared_as(path: pathlib.Path) -> str:
    """Return the label that a run has in a comparison, whose directories are LABEL/seed0, ...; "" outside of one."""
    if not re.fullmatch(r"seed\d+", path.name):
        return ""
    labels = {config.parent.parent for config in path.parent.parent.glob(f"*/seed*/{CONFIG}")}
    return path.parent.name if len(labels) > 1 else ""


def _key(run: Run) -> str:
    """Return text that two runs share if they differ in their seed alone, their teachers included."""
    fields = result_fields(to_dict(run.config))
    fields.pop("seed")
    for knob in SOURCES:
        if knob in fields:
            value = fields[knob]
            fields[knob] = (
                [_source_key(v) for v in value] if isinstance(value, list) else _source_key(value)
            )
    return json.dumps(fields, sort_keys=True)


def _source_key(source: Any) -> str:
    """Return what a teacher or initial weights are, whatever their seed; the path itself if it is not a run now."""
    name, _, number = str(source).rpartition(":")
    for path, student in ((name, number), (str(source), "")):
        if path and (pathlib.Path(path) / CONFIG).exists():
            config = read_config(pathlib.Path(path) / CONFIG, A_RUN)
            fields = {
                k: v for k, v in result_fields(to_dict(config)).items() if k not in ("seed", *SOURCES)
            }
            return f"{json.dumps(fields, sort_keys=True)}:{student}"
    return str(source)


def _labels(groups: Sequence[Sequence[ReportedRun]]) -> list[str]:
    """Return a name for each group: its label in a comparison, or its method and the knobs in which these differ."""
    knobs = [result_fields(to_dict(group[0].run.config)) for group in groups]
    labels = []
    for group, own in zip(groups, knobs, strict=True):
        config = group[0].run.config
        peers = [other for other in knobs if other["method.name"] == config.method.name]
        differ = [name for name in own if name != "seed" and any(o.get(name) != own[name] for o in peers)]
        shown = [f"{name.rpartition('.')[2]} {_short(own[name])}" for name in differ[:SHOWN_KNOBS]]
        more = [f"{len(differ) - SHOWN_KNOBS} more"] * (len(differ) > SHOWN_KNOBS)
        state = [] if group[0].summary is not None else [f"seed {group[0].seed}", "not complete"]
        label = compared_as(group[0].run.path)
        notes = ", ".join(state if label else [*shown, *more, *state])
        name = label or str(config.method.name)
        labels.append(f"{name} ({notes})" if notes else name)
    twice = {label for label in labels if labels.count(label) > 1}
    return [
        f"{label}, {group[0].run.path}" if label in twice else label
        for label, group in zip(labels, groups, strict=True)
    ]


def _short(value: Any) -> str:
    texts = [f"{each:g}" if isinstance(each, float) else str(each) for each in _listed(value)]
    text = " ".join(texts)
    return text if len(text) <= 24 else f"{text[:10]}...{text[-10:]}"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@dataclasses.dataclass(frozen=True)
class Alone:
    """A student that was trained alone, beside one of the same network, width and size.

    Attributes:
        group: of its runs.
        row: its accuracy.
    """

    group: Group
    row: PredictorRow


def baselines(group: Group, groups: Sequence[Group]) -> dict[str, Alone]:
    """Return the same networks trained alone for as many epochs, by the name of the group's student.

    Of several, the one that comes first. There are none for a group of baselines.
    """
    if group.method == BASELINE:
        return {}
    candidates = [g for g in groups if g.method == BASELINE and g.complete and g.epochs == group.epochs]
    found: dict[str, Alone] = {}
    for row in group.rows:
        for other in candidates:
            for its in other.rows:
                if row.info and its.info and its.last and _same_network(row.info, its.info):
                    found.setdefault(row.predictor, Alone(other, its))
    return found


def _same_network(own: StudentInfo, other: StudentInfo) -> bool:
    return (own.network, own.width, own.parameters) == (other.network, other.width, other.parameters)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of training one ensemble against training its students alone.

    Attributes:
        ensemble: of one run.
        in_turn, in_parallel: of runs with one student each, summed up, and the longest; None if a student lacks one.
        together: of one run that trains all of them side by side, with nothing shared; None if there is none.
        missing: students without a run of their own.
        devices: of all these runs; several if they were not trained on the same.
    """

    ensemble: Spread
    in_turn: float | None
    in_parallel: float | None
    together: Spread | None
    missing: tuple[int, ...]
    devices: tuple[str, ...]


def training_times(group: Group, groups: Sequence[Group]) -> Times | None:
    """Compare the time of an ensemble with that of its students' separate runs of as many epochs.

    Returns:
        None if the group is not complete, has one student, or there are no baselines of as many epochs.
    """
    own = group.run.description.students
    if not group.complete or len(own) < 2 or group.method == BASELINE:
        return None
    alone = [g for g in groups if g.method == BASELINE and g.complete and g.epochs == group.epochs]
    singles = {i: g for i, s in enumerate(own) for g in reversed(alone) if _is_alone(s, g)}
    joint = next(
        (
            g
            for g in alone
            if len(g.run.description.students) == len(own)
            and all(map(_same_network, own, g.run.description.students))
        ),
        None,
    )
    if not singles and joint is None:
        return None
    all_there = len(singles) == len(own)
    each = [spread(_seconds(g)).mean for g in singles.values()]
    used = [group, *singles.values(), *([joint] if joint else [])]
    return Times(
        ensemble=spread(_seconds(group)),
        in_turn=sum(each) if all_there else None,
        in_parallel=max(each) if all_there else None,
        together=spread(_seconds(joint)) if joint else None,
        missing=tuple(s.student for i, s in enumerate(own) if i not in singles),
        devices=tuple(dict.fromkeys(run.devices for g in used for run in g.runs)),
    )


def _is_alone(student: StudentInfo, group: Group) -> bool:
    only = group.run.description.students
    return len(only) == 1 and _same_network(student, only[0])


def _seconds(group: Group) -> list[float]:
    return [run.seconds for run in group.runs if run.seconds is not None]


Points = tuple[tuple[float, Spread], ...]


def curve(group: Group, split: str, name: str) -> Points:
    """Return a metric over the epochs: (epoch, values of the seeds) where all runs of the group have a record."""
    by_run = [
        {
            record["epoch"]: record[name]
            for record in run.records
            if record["split"] == split and name in record
        }
        for run in group.runs
    ]
    epochs = [epoch for epoch in by_run[0] if all(epoch in values for values in by_run)]
    return tuple((epoch, spread(values[epoch] for values in by_run)) for epoch in sorted(epochs))


def loss_terms(group: Group) -> list[str]:
    """Return the names of the loss terms that students have, without those of single blocks."""
    names = dict.fromkeys(
        name.partition("/")[2]
        for record in group.first.records
        if record["split"] == "train"
        for name in record
        if name.startswith("student_") and "/loss" in name
    )
    return [name for name in names if not name.rpartition("_")[2].startswith("block")]
