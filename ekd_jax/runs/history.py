"""The history of a run: what changed in its configuration while it was trained, and where it branched off.

`history.json` is a list of `Change`, the first one first. A run that was never changed has none.
"""

import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any

from ml_collections import FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.common.files import write_json
from ekd_jax.common.log import logger
from ekd_jax.common.records import as_json, as_record, read_json
from ekd_jax.config.resolve import to_dict
from ekd_jax.runs.checkpoint import DAMAGED, FOLDER, open_checkpoints, saved_steps
from ekd_jax.runs.records import A_RUN, BENCHMARK, CONFIG, ENVIRONMENT, HISTORY, SUMMARY, TRACKER
from ekd_jax.runs.state import TrainState

LEFT_BEHIND = (
    ".lock",
    FOLDER,
    DAMAGED,
    SUMMARY,
    ENVIRONMENT,
    BENCHMARK,
    TRACKER,
    "wandb",
    "profile",
)  # by a branch
REWIND = "rewind"
Changes = Mapping[str, tuple[Any, Any]]

# What decides which examples and which networks a run has, and how its steps are counted.
FIXED = ("seed", "model.", "method.name", "data.name", "data.train_examples", "data.validation_examples",
         "data.extra", "data.test_split", "data.corrupt", "train.batch_size")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Permit:
    """Permission to change knobs of a run when it goes on.

    Attributes:
        how: the flag that asks for it.
        knobs: their dotted names; None: all that can.
    """

    how: str
    knobs: tuple[str, ...] | None = None

    def allows(self, knob: str) -> bool:
        """Return whether a knob may change."""
        return can_change(knob) and (self.knobs is None or knob in self.knobs)


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a run.

    Attributes:
        step: number of steps taken before.
        time: when, in UTC.
        how: the flag that asked for it.
        knobs: dotted name -> value before and after.
        source: directory of the run that it branched off; "" if it did not.
    """

    step: int
    time: str
    how: str
    knobs: dict[str, tuple[Any, Any]]
    source: str = ""


def can_change(knob: str) -> bool:
    """Return whether a knob may change after a run has started."""
    return not any(knob == fixed or (fixed.endswith(".") and knob.startswith(fixed)) for fixed in FIXED)


def read_history(path: pathlib.Path) -> tuple[Change, ...]:
    """Return the changes of a run, the first one first.

    Raises:
        UserError: the file is damaged.
    """
    if not (path / HISTORY).exists():
        return ()
    return as_record(read_json(path / HISTORY, A_RUN), tuple[Change, ...], path / HISTORY)


def check(path: pathlib.Path, steps: int, state: TrainState, changes: Changes) -> None:
    """Raise UserError unless a run can go on with changed knobs from where it stands; nothing is written.

    Args:
        path: directory of the run.
        steps: of the whole run, after the change.
        state: shapes or arrays of the state that the changed configuration trains.
        changes: knob -> value before and after.
    """
    saved = saved_steps(path)
    if not saved:
        return
    if steps <= saved[-1]:
        raise UserError(
            f"the run in {path} has taken {saved[-1]:,} steps, and with these changes it would have {steps:,}: "
            f"ask for more, as in --config.train.epochs=N"
        )
    with open_checkpoints(path) as checkpoints:
        different = checkpoints.differences(state, saved[-1])
    if different:
        raise UserError(
            f"the run in {path} cannot go on with {_listed(changes)}: its state would have other arrays "
            f"({different}); start a new run, from its weights with model.initial_weights"
        )


def change(path: pathlib.Path, config: FrozenConfigDict, changes: Changes, permit: Permit) -> None:
    """Write a changed configuration into a run's directory, and into its history; say what changes.

    The summary of a run that was complete is kept as `summary-<steps>.json`.

    Args:
        path: directory of the run.
        config: the complete configuration that it goes on with.
        changes: knob -> value before and after; also what follows from knobs, such as the learning rate.
        permit: of the changes.
    """
    step = max(saved_steps(path), default=0)
    logger.info(f"{permit.how}, from step {step:,} on: {_listed(changes)}")
    _append(path, Change(step, _now(), permit.how, dict(changes)))
    if parallel.is_main():
        if (path / SUMMARY).exists():
            os.replace(path / SUMMARY, path / f"summary-{step}.json")
        write_json(path / CONFIG, to_dict(config))
    parallel.gathered(0)  # all processes go on from there


def rewinds(path: pathlib.Path) -> int:
    """Return how often a run was rewound because its loss was not finite."""
    return sum(entry.how == REWIND for entry in read_history(path))


def last_rewind(path: pathlib.Path) -> int | None:
    """Return the step that a run was rewound to last; None if it never was."""
    return next((entry.step for entry in reversed(read_history(path)) if entry.how == REWIND), None)


def rewind(path: pathlib.Path, step: int, failed: int, factor: float) -> None:
    """Note in a run's history that it was rewound.

    Args:
        path: directory of the run.
        step: that it goes on from.
        failed: the step that was not finite.
        factor: of the learning rate from now on.
    """
    _append(
        path, Change(step, _now(), REWIND, {"learning rate factor": (None, factor), "step": (failed, step)})
    )


def _append(path: pathlib.Path, entry: Change) -> None:
    """Append an entry to the history; all processes wait until it is written."""
    if parallel.is_main():
        _write_appended(path, entry)
    parallel.gathered(0)


def _write_appended(path: pathlib.Path, entry: Change) -> None:
    write_json(path / HISTORY, as_json([*read_history(path), entry]))


def branch(source: pathlib.Path, path: pathlib.Path) -> None:
    """Make a copy of a run as it stands, with its latest checkpoint, to train on in another directory.

    If `path` is such a branch already, nothing happens, and so the same command resumes it.

    Args:
        source: directory of the run; it is only read.
        path: new or empty directory.

    Raises:
        UserError: `source` has no checkpoint, or `path` holds something else.
    """
    if parallel.is_main():
        _branch(source, path)
    parallel.gathered(0)


def _branch(source: pathlib.Path, path: pathlib.Path) -> None:
    before = read_history(path)
    if any(entry.source == str(source.absolute()) for entry in before):
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"--workdir={path} is not empty and no branch of {source}: give --from_run a new directory"
        )
    with open_checkpoints(source) as checkpoints:
        step = checkpoints.choose()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        shutil.copytree(source, partial, ignore=lambda folder, names: _left_behind(folder, names, source))
        shutil.copytree(source / FOLDER / str(step), partial / FOLDER / str(step))
        _write_appended(partial, Change(step, _now(), "--from_run", {}, str(source.absolute())))
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info(f"{path} branches off {source} at step {step:,}")


def _left_behind(folder: str, names: list[str], source: pathlib.Path) -> set[str]:
    """Return what a branch does not copy of the run's own directory; earlier runs of its plan are copied whole."""
    if pathlib.Path(folder) != source:
        return {".lock"} & set(names)
    partial = {name for name in names if name.startswith(".")}
    return partial | {name for name in names if name in LEFT_BEHIND or name.startswith("summary-")}


def _listed(changes: Changes) -> str:
    return ", ".join(f"{knob}={after} (was {before})" for knob, (before, after) in changes.items())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
