"""Choosing the best student of a run within limits on its cost."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from ekd_jax.common.errors import UserError
from ekd_jax.common.files import replacing
from ekd_jax.common.text import human, table, three_digits
from ekd_jax.runs.benchmarking import measured, pinned
from ekd_jax.runs.describe import width_label
from ekd_jax.runs.exporting import some_test_images
from ekd_jax.runs.metrics import read_metrics
from ekd_jax.runs.run import Run
from ekd_jax.students.formats.export import export
from ekd_jax.students.formats.exportable import exportable_student
from ekd_jax.students.formats.record import ExportRecord
from ekd_jax.students.formats.registry import check_formats
from ekd_jax.students.formats.request import Options, Request
from ekd_jax.students.formats.timing import Conditions, Measurement, student_subject
from ekd_jax.students.student import LoadedStudent, check_output, write_student

EXPORTED = "exported"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on a student; None: no limit.

    Attributes:
        max_latency_ms: median time of a call.
        max_parameters: number of parameters.
        max_megabytes: size of the file that the runtime loads, in 10^6 bytes.
        max_macs: multiply-accumulates for one image.
        min_top1: top-1 accuracy in per cent, as `Accuracy.last`.
    """

    max_latency_ms: float | None = None
    max_parameters: float | None = None
    max_megabytes: float | None = None
    max_macs: float | None = None
    min_top1: float | None = None


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy of a student in per cent, as the run recorded it.

    Attributes:
        last: at the last evaluation.
        best: at the best evaluation.
        test: on the test set, at the last evaluation; equal to `last` unless the run held images out.
    """

    last: float
    best: float
    test: float


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A student with all that it costs.

    Attributes:
        student: its number.
        width: its width, with the name of its network if that is not the run's.
        parameters, macs: as in `StudentInfo`.
        file_bytes: size of the file that the runtime loads.
        latency_ms: median time of a call.
        accuracy: None if the run was not evaluated.
        misses: a sentence for each limit that it misses, the worst first; empty if it fits.
        excess: by how much it misses the worst one, as a share of that limit; 0 if it fits.
    """

    student: int
    width: str
    parameters: int
    macs: int
    file_bytes: int
    latency_ms: float
    accuracy: Accuracy | None
    misses: tuple[str, ...] = ()
    excess: float = 0.0


@dataclasses.dataclass(frozen=True)
class Choice:
    """The students of a run, in the order in which they are preferred.

    Attributes:
        run: with the checkpoint that they are of.
        candidates: those that fit, best first, then the others, the one first that misses its limits by least.
        split: "validation" or "test": what `Accuracy.last` is measured on; "" if the run was not evaluated.
        step: of that evaluation.
        conditions: what latencies are of.
        batch_size: images in a call.
        measurement: of the student that was measured first.
    """

    run: Run
    candidates: tuple[Candidate, ...]
    split: str
    step: int
    conditions: Conditions
    batch_size: int
    measurement: Measurement

    @property
    def fitting(self) -> list[Candidate]:
        """The students that fit, best first."""
        return [each for each in self.candidates if not each.misses]

    @property
    def winner(self) -> Candidate:
        """The best student that fits.

        Raises:
            UserError: none does.
        """
        first = self.candidates[0]
        if first.misses:
            raise UserError(
                f"no student of {self.run.path} fits: student {first.student} is closest, but {first.misses[0]}"
            )
        return first


def check_limits(limits: Limits) -> None:
    """Raise UserError for a limit that is not a number above 0, or an accuracy that is not in per cent."""
    for name, value in vars(limits).items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name}={value:g} must be above 0")
    if limits.min_top1 is not None and not 1 < limits.min_top1 <= 100:
        raise UserError(
            f"--min_top1={limits.min_top1:g} is in per cent: from 1 to 100, as in --min_top1=95"
        )


def choose(run: Run, limits: Limits, conditions: Conditions, batch_size: int = 1) -> Choice:
    """Compare the students of a run with limits.

    Students are measured first, unless measurements that still hold are kept with the run.

    Args:
        run: its latest checkpoint is read, or that of `step`; it may still be training.
        limits: on accuracy and costs.
        conditions: runtime, device and threads that latency and file are of.
        batch_size: images in a call.

    Raises:
        UserError: a limit makes no sense, a network cannot be written for the runtime, or an accuracy is asked for and
            the run was not evaluated.
    """
    check_limits(limits)
    run = pinned(run)
    accuracies, split, step = recorded_accuracies(run)
    if limits.min_top1 is not None and not accuracies:
        raise UserError(f"--min_top1={limits.min_top1:g}: the run in {run.path} was not evaluated yet")
    infos = run.description.students
    networks = [student_subject(run.student(s.student), f"student_{s.student}") for s in infos]
    found = measured(run.path, networks, conditions, batch_size)
    candidates = []
    for info, network in zip(infos, networks, strict=True):
        own = found[network.name]
        candidate = Candidate(
            student=info.student,
            width=width_label(info, run.description.model),
            parameters=info.parameters,
            macs=info.macs,
            file_bytes=own.file_bytes,
            latency_ms=own.median_ms,
            accuracy=accuracies.get(info.student),
        )
        candidates.append(compared(candidate, limits))
    return Choice(
        run=run,
        candidates=tuple(sorted(candidates, key=_preference)),
        split=split,
        step=step,
        conditions=conditions,
        batch_size=batch_size,
        measurement=min(found.values(), key=lambda each: each.time),
    )


def _preference(own: Candidate) -> tuple[float, float, int]:
    """Return what students are sorted by: what fits, then accuracy, then cost. Unevaluated, the largest is first."""
    last = own.accuracy.last if own.accuracy else math.log(own.parameters)
    return own.excess, -last, own.macs


def recorded_accuracies(run: Run) -> tuple[dict[int, Accuracy], str, int]:
    """Return what a run recorded of its students by number, on which split, and at which step.

    It is the validation set if the run held images out, else the test set; nothing, "" and 0 if it was not evaluated.
    """
    names = {s.student: f"student_{s.student}/top1" for s in run.description.students}
    by_split: dict[str, list[dict[str, Any]]] = {"validation": [], "test": []}
    for record in read_metrics(run.path):
        if set(names.values()) <= record.keys():
            by_split.get(record["split"], []).append(record)
    split = next((name for name, records in by_split.items() if records), "")
    if not split:
        return {}, "", 0
    records, tests = by_split[split], by_split["test"] or by_split[split]
    found = {
        number: Accuracy(records[-1][name], max(record[name] for record in records), tests[-1][name])
        for number, name in names.items()
    }
    return found, split, int(records[-1]["step"])


def compared(own: Candidate, limits: Limits) -> Candidate:
    """Return a student with the limits that it misses."""
    costs = [
        ("max_latency_ms", own.latency_ms, f"its {three_digits(own.latency_ms)} ms are"),
        ("max_parameters", own.parameters, f"its {own.parameters:,} parameters are"),
        ("max_megabytes", own.file_bytes / 1e6, f"its {own.file_bytes:,} bytes are"),
        ("max_macs", own.macs, f"its {own.macs:,} multiply-accumulates are"),
    ]
    missed = []
    for name, value, text in costs:
        limit = getattr(limits, name)
        if limit is not None and value is not None and value > limit:
            excess = value / limit - 1
            missed.append((excess, f"{text} {_per_cent(excess)} above --{name}={limit:.10g}"))
    if limits.min_top1 is not None and own.accuracy and own.accuracy.last < limits.min_top1:
        short = limits.min_top1 - own.accuracy.last
        text = (
            f"its top-1 of {own.accuracy.last:.2f} % is {short:.2g} below --min_top1={limits.min_top1:.10g}"
        )
        missed.append((short / limits.min_top1, text))
    missed.sort(reverse=True)
    return dataclasses.replace(
        own,
        misses=tuple(text for _, text in missed),
        excess=max((excess for excess, _ in missed), default=0.0),
    )


def _per_cent(share: float) -> str:
    return f"{100 * share:,.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def as_text(choice: Choice) -> str:
    """Return the students as a table, those that fit first, best first, and why the others do not."""
    held_out = choice.split == "validation"
    rows = []
    for own in choice.candidates:
        ranked = own.accuracy
        row = [
            str(own.student),
            own.width,
            f"{own.parameters:,}",
            human(own.macs),
            three_digits(own.file_bytes / 1e6),
            three_digits(own.latency_ms),
            *(f"{value:.2f}" for value in ((ranked.last, ranked.best) if ranked else ())),
            *([f"{ranked.test:.2f}"] if held_out and ranked else []),
            "no" if own.misses else "yes",
        ]
        rows.append(row)
    accuracy = ["top-1 last", "top-1 best", *(["test top-1"] if held_out else [])] if choice.split else []
    header = ["student", "width", "parameters", "MACs", "MB", "ms", *accuracy, "fits"]
    lines = [table(rows, header)]
    lines += [f"student {own.student}: {'; '.join(own.misses)}" for own in choice.candidates if own.misses]
    return "\n".join([*lines, "", *_explained(choice)])


def _explained(choice: Choice) -> list[str]:
    found, run = choice.conditions, choice.run
    lines = []
    if choice.split:
        lines.append(
            f"top-1: per cent of the {choice.split} set; last: at step {choice.step:,}, which decides"
        )
        if choice.split == "test":
            lines.append("test images choose here, which favors the winner: hold validation images out")
            lines.append("with data.validation_examples for an unbiased choice")
        if run.step != choice.step:
            lines.append(f"costs are of the latest checkpoint, of step {run.step:,}")
    else:
        lines.append("this run was not evaluated yet: the largest student is first")
    threads = f"{found.threads} thread{'s' * (found.threads > 1)}"
    lines.append(
        f"ms: median of a call, batch {choice.batch_size:,}, {found.runtime} {found.version}, {threads},"
    )
    lines.append(f"    {found.device}, measured at {choice.measurement.time}")
    lines.append(f"MB: the file that {found.runtime} loads")
    return lines


def extract(
    choice: Choice, output: pathlib.Path, formats: Sequence[str] = ()
) -> tuple[LoadedStudent, ExportRecord | None]:
    """Write the best student that fits to a new directory, and, in its `exported`, files for other runtimes.

    Either everything is written or nothing.

    Args:
        choice: as `choose` returns it.
        output: new directory, a student's as `extract` writes it.
        formats: keys of `FORMATS`; none if not given.

    Raises:
        UserError: no student fits, the directory is not empty or cannot be written, or a format fails.
    """
    check_extraction(output, formats)
    run, number = choice.run, choice.winner.student
    student, record = run.with_scores_if_known(run.student(number)), None
    if formats:
        try:
            images = some_test_images(run.config, student.input_shape)
        except UserError as error:
            raise UserError(
                f"{error}; or leave out --format, and compare on other images: ekd export --verify_with=DIRECTORY"
            ) from error
    try:
        with replacing(output) as partial, _disk_errors():
            student = write_student(partial, student)
            if formats:
                where = f"test images of {run.config.data.name}"
                record = export(
                    Request((exportable_student(student),), images), formats, partial / EXPORTED, where
                )
    except OSError as error:
        raise UserError(
            f"cannot write --extract={output}: {error.strerror}; nothing of it is left"
        ) from error
    return student, record


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Raise an OSError in place of the UserError that reports it, and that names a partial directory."""
    try:
        yield
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


def check_extraction(output: pathlib.Path, formats: Sequence[str]) -> None:
    """Raise UserError unless a student can be written to a directory, in these formats."""
    check_output(output, "extract")
    if formats:
        if "torch" in formats:
            raise UserError("--format=torch needs a library: extract first, then ekd export --library=NAME")
        check_formats(formats, Options())
