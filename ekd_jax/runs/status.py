"""The state of a run as its directory tells it: how far it is, how good, how fast, and whether a process trains it.

Only files are read, as plain JSON, so runs of other versions, and files that are just being written, do no harm.
"""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ekd_jax.common.errors import UserError
from ekd_jax.common.files import is_locked, read_bytes
from ekd_jax.common.text import clock, megabytes, table
from ekd_jax.methods.base import EARLIER
from ekd_jax.runs.checkpoint import saved_steps
from ekd_jax.runs.metrics import MEMORY, METRICS, Latest, read_metrics
from ekd_jax.runs.records import CONFIG, STUDENTS, SUMMARY
from ekd_jax.runs.workdir import is_run

RUNNING, STOPPED, COMPLETE, NOT_STARTED = "running", "stopped", "complete", "not started"
GRACE_SECONDS, LOOK_SECONDS = 20.0, 2.0
MOST_PARTS = 200  # runs in a directory that are listed


@dataclasses.dataclass(frozen=True)
class PredictorStatus:
    """The latest results of one student, or of the ensemble. Accuracies are in per cent.

    Attributes:
        name: `student_1`, ..., `ensemble`.
        train_top1: of the last training record.
        top1: of the last evaluation on the watched set.
        best: the best of these.
        best_epoch: when.
        losses: the terms of its loss, means of the last training record.
    """

    name: str
    train_top1: float | None
    top1: float | None
    best: float | None
    best_epoch: float | None
    losses: dict[str, float]


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        path: its directory.
        state: "running" if a process holds its lock, "complete", "stopped" or "not started".
        model, method, data, seed: what it trains, as its configuration says; empty if that cannot be read.
        step, steps: taken, and of the whole run; None: not known.
        epoch, epochs: the same in passes over the training set.
        loss: mean of the last training record.
        images_per_second: of that record.
        remaining_seconds: estimated from it; None unless it is running.
        memory_mb: the most that a device, or the process on a CPU, has taken so far.
        checkpoint: step of the latest checkpoint.
        watched: the set that is evaluated while training: "validation" or "test".
        predictors: every student, and the ensemble.
        parts: the runs that its plan trains before it, or the runs in a directory of several.
    """

    path: str
    state: str
    model: str = ""
    method: str = ""
    data: str = ""
    seed: int | None = None
    step: int = 0
    steps: int | None = None
    epoch: float = 0.0
    epochs: float | None = None
    loss: float | None = None
    images_per_second: float | None = None
    remaining_seconds: float | None = None
    memory_mb: float | None = None
    checkpoint: int | None = None
    watched: str = "test"
    predictors: tuple[PredictorStatus, ...] = ()
    parts: tuple["RunStatus", ...] = ()

    @property
    def several(self) -> bool:
        """Whether this is a directory of several runs, not a run or a plan."""
        earlier = pathlib.Path(self.path, EARLIER)
        return any(pathlib.Path(part.path).parent != earlier for part in self.parts)

    @property
    def place(self) -> str:
        """Which run of a plan `current` is, in words; "" without a plan."""
        run, number = self.current, len(self.parts) + 1
        if number == 1:
            return ""
        if run is self:
            return f"run {number} of {number}"
        return f"earlier run {1 + self.parts.index(run)}, {pathlib.Path(run.path).name}"

    @property
    def current(self) -> "RunStatus":
        """The run of a plan that trains now, or else the one that was reached last."""
        if self.state in (COMPLETE, RUNNING) and not any(part.state == RUNNING for part in self.parts):
            return self
        started = [run for run in (*self.parts, self) if run.model or run.step]
        return next((run for run in started if run.state == RUNNING), started[-1] if started else self)


def read_status(path: pathlib.Path) -> RunStatus:
    """Return the status of a run, or of all runs in a directory of several.

    Raises:
        UserError: there is no run.
    """
    if is_run(path):
        return _status(path)
    runs = [run for pattern in ("*", "*/*") for run in sorted(path.glob(pattern)) if is_run(run)]
    runs = [run for run in runs if EARLIER not in run.relative_to(path).parts]
    if not runs:
        what = "there is no such directory" if not path.exists() else f"it has no {CONFIG}"
        raise UserError(f"{path} is not the directory of a run, nor of several: {what}")
    parts = tuple(_status(run) for run in sorted(runs, key=_in_order)[:MOST_PARTS])
    states = {part.state for part in parts}
    state = next((s for s in (RUNNING, STOPPED, NOT_STARTED) if s in states), COMPLETE)
    return RunStatus(str(path), RUNNING if is_locked(path / ".lock") else state, parts=parts)


def _in_order(path: pathlib.Path) -> tuple[str, int]:
    """Return what sorts seed10 behind seed9."""
    name = str(path)
    digits = len(name) - len(name.rstrip("0123456789"))
    return name[: len(name) - digits], int(name[-digits:]) if digits else -1


def _status(path: pathlib.Path) -> RunStatus:
    parts = tuple(_status(run) for run in sorted((path / EARLIER).glob("*")) if is_run(run))
    config, students, summary = (_read(path / name) for name in (CONFIG, STUDENTS, SUMMARY))
    train, data = (_section(config, name) for name in ("train", "data"))
    latest = Latest()
    for record in read_metrics(path, quiet=True) if (path / METRICS).exists() else ():
        latest.add(record)
    locked = bool(is_locked(path / ".lock"))
    saved = max(saved_steps(path), default=None)
    step = max(latest.step, saved or 0)
    batch = _number(train.get("batch_size"))
    examples = _number(_section(students, "data").get("train_examples"))
    epochs = _number(train.get("epochs"))
    steps = None
    if epochs and batch and examples:
        steps = max(1, round(epochs * examples / batch))
    if locked or any(part.state == RUNNING for part in parts):
        state = RUNNING  # a complete run, too, may be going on with more epochs
    elif summary:
        state, step = COMPLETE, summary.get("steps") or step
        steps = step
    else:
        state = STOPPED if config or parts else NOT_STARTED
    speed = _number(latest.train.get("images/s"))
    left = None
    if locked and speed and steps and batch:
        # what was trained since the last record is not written yet
        left = max(0.0, (steps - step) * batch / speed - (time.time() - _modified(path / METRICS)))
    return RunStatus(
        str(path),
        state,
        model=_text(_section(config, "model").get("name")),
        method=_text(_section(config, "method").get("name")),
        data=_text(data.get("name")),
        seed=seed if isinstance(seed := config.get("seed"), int) else None,
        step=step,
        steps=steps,
        epoch=round(step * batch / examples, 4) if examples and batch else latest.epoch,
        epochs=epochs,
        remaining_seconds=left,
        checkpoint=saved,
        parts=parts,
        **of_records(latest, _names(students, latest)),
    )


def of_records(latest: Latest, names: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a `RunStatus` that the records of a run tell."""
    found = latest.evaluations.get(latest.watched, {})

    def losses(name: str) -> dict[str, float]:
        terms = {
            key.removeprefix(f"{name}/loss_"): float(value)
            for key, value in latest.train.items()
            if key.startswith(f"{name}/loss_") and _number(value) is not None
        }
        # `intermediate` is the sum of `intermediate_block1`, ...
        return {t: v for t, v in terms.items() if not any(t.startswith(f"{other}_") for other in terms)}

    return {
        "loss": _number(latest.train.get("loss")),
        "images_per_second": _number(latest.train.get("images/s")),
        "memory_mb": _number(latest.train.get(MEMORY)),
        "watched": latest.watched,
        "predictors": tuple(
            PredictorStatus(
                name,
                train_top1=_number(latest.train.get(f"{name}/top1")),
                top1=_number(found.get(f"{name}/top1")),
                best=latest.best[name][0] if name in latest.best else None,
                best_epoch=latest.best[name][1] if name in latest.best else None,
                losses=losses(name),
            )
            for name in names
        ),
    }


def _names(students: Mapping[str, Any], latest: Latest) -> list[str]:
    """Return the names of what predicts: as the records have them, else as many students as are described."""
    evaluated = latest.evaluations.get(latest.watched, latest.train)
    names = [key.removesuffix("/top1") for key in evaluated if key.endswith("/top1")]
    if not names and isinstance(students.get("students"), list):
        names = [*(f"student_{i + 1}" for i in range(len(students["students"]))), "ensemble"]
    return sorted(names, key=lambda name: (name == "ensemble", not name.startswith("student_")))


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is none or it cannot be read."""
    try:
        found = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _section(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = found.get(name)
    return section if isinstance(section, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def _modified(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


# --- as text ---------------------------------------------------------------------------------------


def title(status: RunStatus) -> str:
    """Return what a run trains, in short: "resnet8, oem, digits, seed 0"."""
    seed = "" if status.seed is None else f"seed {status.seed}"
    return ", ".join(filter(None, (status.model, status.method, status.data, seed)))


def facts(status: RunStatus) -> str:
    """Return one line with how far a run is, how fast, and what is left."""
    whole = "" if status.steps is None else f" of {status.steps:,}"
    epochs = "" if status.epochs is None else f" of {status.epochs:g}"
    parts = [f"step {status.step:,}{whole}", f"epoch {status.epoch:.2f}{epochs}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.images_per_second is not None:
        parts.append(f"{status.images_per_second:,.0f} images/s")
    if status.remaining_seconds is not None:
        parts.append(f"{clock(status.remaining_seconds)} left")
    if status.memory_mb is not None:
        parts.append(megabytes(1e6 * status.memory_mb))
    if status.checkpoint is not None:
        parts.append(f"checkpoint {status.checkpoint:,}")
    return ", ".join(parts)


def columns(status: RunStatus) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of what predicts, the most important columns first.

    The first three are always there; the loss terms follow.
    """
    terms = list(dict.fromkeys(term for row in status.predictors for term in row.losses))
    header = ["top-1", f"{status.watched} last", "best", "epoch", "train"]
    header += [f"loss {terms[0]}", *terms[1:]] if terms else []

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = [
        [
            row.name.replace("_", " "),
            *(cell(value, 2) for value in (row.top1, row.best)),
            cell(row.best_epoch, 1),
            cell(row.train_top1, 1),
            *(cell(row.losses.get(term), 4) for term in terms),
        ]
        for row in status.predictors
    ]
    return [name.replace("_", " ") for name in header], rows


def fitting(header: list[str], rows: list[list[str]], width: int, gap: int = 2) -> int:
    """Return how many columns, from the first, fit into a width; at least two."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    fits = [n for n in range(2, len(widths) + 1) if sum(widths[:n]) + gap * (n - 1) <= width]
    return max(fits, default=2)


def as_text(status: RunStatus, width: int = 1000) -> str:
    """Return a status as plain text, no wider than asked for where columns can be left out."""
    if status.several:
        return overview(status)
    shown = status.current
    place = f"{status.place}: " if status.place else ""
    lines = [f"{status.path}: {status.state}", place + title(shown), facts(shown)]
    if shown.predictors:
        header, rows = columns(shown)
        kept = fitting(header, rows, width)
        lines.append(table([row[:kept] for row in rows], header[:kept]))
    return "\n".join(filter(None, lines))


def overview(status: RunStatus) -> str:
    """Return the runs in a directory as a table, one line each."""
    found = [(part, {p.name: p for p in part.current.predictors}) for part in status.parts]
    names = list(dict.fromkeys(name for _, rows in found for name in rows if name.startswith("student_")))
    names.append("ensemble")

    def top1(rows: Mapping[str, PredictorStatus], name: str) -> str:
        value = rows[name].top1 if name in rows else None
        return "" if value is None else f"{value:.2f}"

    rows = [
        [
            str(pathlib.Path(part.path).relative_to(status.path)),
            part.state,
            f"{part.current.step:,}" + ("" if part.current.steps is None else f"/{part.current.steps:,}"),
            "" if part.current.remaining_seconds is None else clock(part.current.remaining_seconds),
            *(top1(each, name) for name in names),
        ]
        for part, each in found
    ]
    header = ["run", "state", "step", "left", *(name.replace("_", " ") for name in names)]
    return f"{status.path}: {status.state}\n{table(rows, header)}"


def one_line(status: RunStatus) -> str:
    """Return a status in one line, for a log."""
    if status.several:
        done = sum(part.state == COMPLETE for part in status.parts)
        running = [one_line(part) for part in status.parts if part.state == RUNNING]
        return "; ".join([f"{status.state}, {done} of {len(status.parts)} runs complete", *running])
    shown = status.current
    top1 = " ".join(f"{row.top1:.2f}" for row in shown.predictors if row.top1 is not None)
    top1 = top1 and f"{shown.watched} top-1 {top1}"
    return ", ".join(filter(None, (status.state, status.place, facts(shown), top1)))


# --- while it runs -----------------------------------------------------------------------------------


def follow(path: pathlib.Path, interval: float) -> Iterator[RunStatus]:
    """Yield the status of a run at once, every so many seconds, and when it has ended.

    Between two runs of a plan or of a directory no lock is held for some seconds, so the end counts once nothing
    has run for `GRACE_SECONDS`; a run that is alone ends with its lock.

    Raises:
        UserError: there is no run.
    """
    idle, shown = -math.inf, -math.inf
    while True:
        status, now = read_status(path), time.monotonic()
        if status.state == RUNNING:
            idle = now
        over = status.state == COMPLETE or not status.parts or now - idle >= GRACE_SECONDS
        if status.state != RUNNING and over:
            yield status
            return
        if now - shown >= interval:
            yield status
            shown = now
        time.sleep(min(interval, LOOK_SECONDS))
