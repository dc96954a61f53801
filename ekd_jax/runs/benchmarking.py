"""Benchmarks of a run's students: what is timed, the record that is kept with the run, and whether it still holds."""

import dataclasses
import pathlib
from collections.abc import Sequence

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.log import logger
from ekd_jax.common.records import read_record, write_record
from ekd_jax.common.text import table, three_digits
from ekd_jax.runs.checkpoint import open_checkpoints
from ekd_jax.runs.exporting import exportable_ensemble
from ekd_jax.runs.records import A_RUN, BENCHMARK
from ekd_jax.runs.run import Run
from ekd_jax.students.formats.timing import (
    ROUNDS,
    SECONDS,
    Conditions,
    Measurement,
    Subject,
    digest,
    measure,
    student_subject,
)

ENSEMBLE = "ensemble"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Measurements of the networks of a run; `benchmark.json`.

    Attributes:
        measurements: one for each network, runtime, batch size, number of threads and device.
        format: version of this record.
    """

    measurements: tuple[Measurement, ...]
    format: int = 1


def pinned(run: Run) -> Run:
    """Return the run with the checkpoint that is its latest now, although it may go on training."""
    with open_checkpoints(run.path) as checkpoints:
        return dataclasses.replace(run, step=checkpoints.choose(run.step))


def subjects(run: Run, student: str = "all") -> list[Subject]:
    """Return the networks of a run that are timed.

    Args:
        run: its checkpoint is read.
        student: the number of a student, "ensemble", or "all" for all students and the ensemble; the ensemble of a
            single student is left out.

    Raises:
        UserError: no such student, or the checkpoint is damaged.
    """
    run, count = pinned(run), len(run.description.students)
    numbers, ensemble = range(1, count + 1), count > 1
    if student == ENSEMBLE:
        numbers, ensemble = range(0), True
    elif student != "all":
        if not student.isdecimal():
            raise UserError(
                f"--student={student} must be the number of a student, from 1, or {ENSEMBLE}, or all"
            )
        numbers, ensemble = range(int(student), int(student) + 1), False
    found = [student_subject(run.student(number), f"student_{number}") for number in numbers]
    if ensemble:
        own = run.checkpoint
        found.append(Subject(ENSEMBLE, exportable_ensemble(run), own.step, digest(own.variables)))
    return found


def read_benchmark(path: pathlib.Path) -> tuple[Measurement, ...]:
    """Return the measurements that are kept with a run; none of a damaged file, with a warning."""
    if not (path / BENCHMARK).exists():
        return ()
    try:
        kept = read_record(path / BENCHMARK, Benchmark, A_RUN).measurements
        if not all(each.median_ms > 0 and each.file_bytes > 0 for each in kept):
            raise UserError(f"{path / BENCHMARK} is damaged: it has times or sizes that are not above 0")
    except UserError as error:
        logger.warning(f"warning: what was measured before is ignored: {error}")
        return ()
    return kept


def keep(path: pathlib.Path, new: Sequence[Measurement]) -> bool:
    """Keep measurements with a run, in place of earlier ones of the same network under the same conditions.

    Returns:
        Whether they are kept; where the run's directory cannot be written to, a warning says so.
    """
    places = [_place(each) for each in new]
    kept = [each for each in read_benchmark(path) if _place(each) not in places]
    try:
        write_record(path / BENCHMARK, Benchmark((*kept, *new)))
    except OSError as error:
        logger.warning(f"warning: the measurements cannot be kept with the run: {reason(error)}")
        return False
    return True


def _place(own: Measurement) -> tuple[str, str, int, int, str]:
    found = own.conditions
    return own.network, found.runtime, own.batch_size, found.threads, found.device


def kept_measurement(
    kept: Sequence[Measurement], subject: Subject, now: Conditions, batch_size: int
) -> tuple[Measurement | None, str]:
    """Return the measurement of a network that still holds, and "", or None and why there is none."""
    found = [m for m in kept if (m.network, m.batch_size) == (subject.name, batch_size)]
    found = [m for m in found if m.conditions.runtime == now.runtime]
    if not found:
        return None, f"not measured in {now.runtime} at batch {batch_size} before"
    for field, what in (("device", "on {}"), ("threads", "with threads={}")):
        there, here = getattr(found[-1].conditions, field), getattr(now, field)
        found = [m for m in found if getattr(m.conditions, field) == here]
        if not found:
            return None, f"measured {what.format(there)}, now {what.format(here)}"
    last = found[-1]
    pairs = [
        ("at step {:,}", last.step, subject.step),
        (f"with {now.runtime} {{}}", last.conditions.version, now.version),
        ("with ekd_jax {}", last.conditions.ekd_jax, now.ekd_jax),
    ]
    for text, there, here in pairs:
        if there != here:
            return None, f"measured {text.format(there)}, now {text.format(here)}"
    if last.weights != subject.weights:
        return None, "measured with other weights"
    return last, ""


def measured(
    path: pathlib.Path,
    networks: Sequence[Subject],
    now: Conditions,
    batch_size: int,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
) -> dict[str, Measurement]:
    """Return measurements of networks of a run by name: the kept ones that still hold, and new ones, which are kept.

    A line says which networks are measured, and why.

    Args:
        path: directory of the run.
        networks: of the run.
        now: what they are timed with.
        batch_size: images in a call.
        seconds, rounds: as in `timing.measure`.

    Raises:
        UserError: as `timing.measure` does.
    """
    kept = read_benchmark(path)
    found = {each.name: kept_measurement(kept, each, now, batch_size) for each in networks}
    missing = [each for each in networks if found[each.name][0] is None]
    for why in dict.fromkeys(why for _, why in found.values() if why):
        names = [name.removeprefix("student_") for name, (_, other) in found.items() if other == why]
        logger.info(f"measuring {_listed(names)}: {why}")
    new = measure(missing, [now], [batch_size], seconds, rounds) if missing else ()
    if new:
        keep(path, new)
    if len(new) < len(missing):
        raise UserError(f"not all students can run in {now.runtime}: choose another --runtime")
    return {name: each for name, (each, _) in found.items() if each} | {each.network: each for each in new}


def _listed(names: Sequence[str]) -> str:
    return f"student{'s' * (len(names) > 1)} {', '.join(names)}"


def as_text(measurements: Sequence[Measurement]) -> str:
    """Return measurements as a table for each batch size, and what they were measured with."""
    lines: list[str] = []
    for size in dict.fromkeys(each.batch_size for each in measurements):
        rows = [_row(each) for each in measurements if each.batch_size == size]
        header = ["student", "runtime", "ms", "10-90 %", "images/s", "load s", "peak MB", "file MB"]
        lines += [f"batch {size:,}", table(rows, header), ""]
    return "\n".join([*lines, *_explained(measurements)])


def _row(own: Measurement) -> list[str]:
    return [
        own.network.removeprefix("student_"),
        own.conditions.runtime,
        three_digits(own.median_ms),
        f"{three_digits(own.p10_ms)}-{three_digits(own.p90_ms)}",
        f"{own.images_per_second:,.0f}",
        f"{own.load_seconds:.2f}",
        f"{own.peak_bytes / 1e6:,.0f}",
        three_digits(own.file_bytes / 1e6),
    ]


def _explained(measurements: Sequence[Measurement]) -> list[str]:
    """Return what the columns are, and what was measured with what, in lines of at most 80 characters or so."""
    apart = max(max(m.rounds_ms) / min(m.rounds_ms) - 1 for m in measurements)
    calls, rounds = min(m.calls for m in measurements), len(measurements[0].rounds_ms)
    several = f"in {rounds} rounds, whose medians differ by up to {100 * apart:.0f} %"
    alone = {m.conditions.runtime: 0 for m in measurements}
    for own in measurements:
        alone[own.conditions.runtime] = max(alone[own.conditions.runtime], own.runtime_bytes)
    return [
        "ms: median time of a call, from normalized float32 images to logits",
        f"10-90 %: range of the calls, of which there are at least {calls:,}"
        + (f"\n    {several}" if rounds > 1 else ""),
        "load s: loading, compiling and the first call; file MB: what the runtime loads",
        "peak MB: memory of the whole process, in which runtimes without a network take",
        f"    {', '.join(f'{runtime} {size / 1e6:,.0f}' for runtime, size in alone.items())}",
        *conditions_as_text([m.conditions for m in measurements]),
    ]


def conditions_as_text(found: Sequence[Conditions]) -> list[str]:
    """Return two lines for each device: versions of the runtimes, and what they run on."""
    lines = []
    for device, cores, threads, cpus in dict.fromkeys(
        (c.device, c.cores, c.threads, c.cpus) for c in found
    ):
        same = [c for c in found if (c.device, c.cpus) == (device, cpus)]
        names = dict.fromkeys(f"{c.runtime} {c.version}" for c in same)
        kept = f"kept on CPU{'s' * (len(cpus) > 1)} {', '.join(map(str, cpus))} of {cores}"
        where = (
            kept if cpus else "of JAX as many as it starts: this system keeps no process on certain CPUs"
        )
        lines += [", ".join(names), f"    {device}, {threads} thread{'s' * (threads > 1)}, {where}"]
    return lines
