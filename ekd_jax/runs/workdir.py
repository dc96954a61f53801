"""The directory of a run: what is in it, who may write to it, and whether a configuration fits it.

config.json       the complete configuration
history.json      what of it was changed after the run had started
environment.json  versions and devices, one entry each time the run was started
students.json     the students, class names and input shape
metrics.jsonl     one record per line      tensorboard/   the same
checkpoints/      the two latest, the best  summary.json  written when the run is complete
damaged/          checkpoints that could not be read
tracker.json      the name of the run in Weights & Biases or trackio, if `train.tracker` asks for one
benchmark.json    how fast its students run, if `benchmark` or `choose` measured it
profile/          traces of steps, for XProf and Perfetto (`--profile`)
earlier/          the runs that a method's plan trains first, one directory each
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.common.files import lock, write_json
from ekd_jax.common.log import logger
from ekd_jax.common.records import read_json, read_record, write_record
from ekd_jax.config.knobs import KNOBS
from ekd_jax.config.resolve import result_fields, to_dict
from ekd_jax.data.classes import listed
from ekd_jax.methods.base import EARLIER
from ekd_jax.runs.history import Changes, Permit, can_change, read_history
from ekd_jax.runs.records import (
    A_RUN,
    CONFIG,
    ENVIRONMENT,
    STUDENTS,
    SUMMARY,
    DataDescription,
    RunDescription,
    Summary,
)

CHOOSE_EXAMPLES = ("name", "extra", "test_split", "validation_examples", "train_examples", "corrupt")
LOOK_SECONDS = 0.1
PACKAGES = (
    *("ekd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets"),
    *("grain", "pillow", "simplejpeg", "opencv-python-headless"),
)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Keep a second run out of a run's directory; the lock of a killed run is released by itself.

    Raises:
        UserError: another process has locked it.
        OSError: nothing can be written there.
    """
    if not parallel.is_main():
        yield
        return
    with open(path / ".lock", "w") as file:
        try:
            has_locks = _lock_patiently(file)
        except BlockingIOError as error:
            raise UserError(
                f"{path} is in use by another process: wait for it, or choose another --workdir"
            ) from error
        if not has_locks:
            logger.warning(
                f"warning: the file system of {path} has no locks: nothing keeps a second run out of this "
                f"directory, and two runs would damage it; make sure that there is only one"
            )
        yield


def _lock_patiently(file: IO[Any]) -> bool:
    """Lock a file as `lock` does; tried twice, because `ekd status` may look at the lock for an instant."""
    try:
        return lock(file)
    except BlockingIOError:
        time.sleep(LOOK_SECONDS)
        return lock(file)


def seed_directory(path: pathlib.Path, seed: int) -> pathlib.Path:
    """Return the directory of one seed's run in a directory of several."""
    return path / f"seed{seed}"


def seed_runs(path: pathlib.Path) -> dict[int, pathlib.Path]:
    """Return seed -> directory of every run in a directory of several, in order; empty if it is none."""
    names = [run.name.removeprefix("seed") for run in path.glob("seed*") if is_run(run)]
    seeds = sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)
    return {seed: seed_directory(path, seed) for seed in seeds}


def is_run(path: pathlib.Path) -> bool:
    """Return whether a directory is that of a run that was started, or whose plan was."""
    return (path / CONFIG).is_file() or (path / EARLIER).is_dir()


def check_one_run(path: pathlib.Path) -> None:
    """Raise UserError if a directory holds the runs of several seeds instead of a run."""
    if not is_run(path) and (runs := seed_runs(path)):
        seeds = ", ".join(map(str, runs))
        first = next(iter(runs.values()))
        raise UserError(
            f"{path} holds runs of the seeds {seeds}: name the directory of one, such as {first}"
        )


def check(path: pathlib.Path, config: FrozenConfigDict, permit: Permit | None = None) -> Changes:
    """Check that a run of `config` may start or resume in `path`; nothing is changed.

    Args:
        path: directory of the run.
        config: a complete configuration.
        permit: what of the configuration may be another one than the run has; nothing if not given.

    Returns:
        Every permitted change, knob -> value before and after.

    Raises:
        UserError: `path` is not a directory, cannot be written to, holds something else, or holds a run whose
            configuration computes something else.
    """
    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    if not existing.is_dir():
        raise UserError(f"--workdir={path}: {existing} is not a directory: choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"--workdir={path}: {existing} is not writable: choose another, or change its permissions"
        )
    if not (path / CONFIG).exists():
        check_one_run(path)
        others = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
        if any(n not in (".lock", EARLIER) and not n.startswith(f".{CONFIG}.") for n in others):
            raise UserError(
                f"--workdir={path} holds other files ({', '.join(others[:3])}) and no run: "
                f"choose an empty or new directory"
            )
        return {}
    stored = read_json(path / CONFIG, A_RUN)
    if not isinstance(stored, dict):
        raise UserError(f"{path / CONFIG} is damaged: restore it, or choose another --workdir")
    old, new = result_fields(stored), result_fields(to_dict(config))
    # A knob that the run does not have is newer than the run, and changes nothing at its default.
    newer = {name: KNOBS[name].default for name in new.keys() - old.keys() if name in KNOBS}
    old |= json.loads(json.dumps(newer))
    changes = {
        name: (old.get(name, "absent"), new.get(name, "absent"))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }
    refused = {name: values for name, values in changes.items() if not (permit and permit.allows(name))}
    if refused:
        different = "; ".join(f"{name}: {there} there, {now} now" for name, (there, now) in refused.items())
        raise UserError(
            f"--workdir={path} holds a run of another configuration ({different}): "
            f"{_after_refusal(path, refused)}"
        )
    return changes


def _after_refusal(path: pathlib.Path, refused: Changes) -> str:
    """Return what the user may do whose configuration is not that of the run."""
    for entry in reversed(read_history(path)):
        if entry.knobs.keys() & refused.keys():
            return f"it was changed at step {entry.step:,} with {entry.how}: pass the same again"
    if not all(map(can_change, refused)):
        return "choose another --workdir, or ask for the same"
    values = {name: tuple(now) if isinstance(now, list) else now for name, (_, now) in refused.items()}
    flags = " ".join(f"--resume_with={name}={now}" for name, now in values.items())
    return f"choose another --workdir, ask for the same, or go on from where it stands with {flags}"


def read_summary(path: pathlib.Path) -> Summary:
    """Return the summary of a complete run.

    Raises:
        UserError: it is damaged.
    """
    try:
        return read_record(path / SUMMARY, Summary, A_RUN)
    except UserError as error:
        raise UserError(
            f"{error}; delete this file and run the same command: it is written again"
        ) from error


def check_same_everywhere(path: pathlib.Path, config: FrozenConfigDict) -> None:
    """Raise UserError unless all processes of a run have the same configuration and see the same directory.

    It waits for all processes, so that none looks into the directory while another one writes there.
    """
    seen = [str(file.relative_to(path)) for file in path.glob("checkpoints/[0-9]*")]
    own = [zlib.crc32(json.dumps(what).encode()) for what in (to_dict(config), sorted(seen))]
    told = parallel.gathered(np.array(own, np.uint32))
    for what, numbers in zip(("the configuration", "the content of --workdir"), told.T, strict=True):
        other = np.flatnonzero(numbers != numbers[0])
        if len(other):
            raise UserError(
                f"{what} of process {other[0]} is not that of process 0: start all processes with the same "
                f"command, and give them a directory that they share ({path})"
            )


def check_description(path: pathlib.Path, config: FrozenConfigDict, description: RunDescription) -> None:
    """Raise UserError unless a run that resumes in `path` has the data and the teachers that it started with.

    The earlier runs of its plan must have had the same data, too.
    """
    assert description.data
    for run in (path, *sorted((path / EARLIER).glob("*"))):
        if not (run / STUDENTS).exists():
            continue
        before = read_record(run / STUDENTS, RunDescription, A_RUN)
        if _reads_the_same(run, config):
            check_same_data(run, before, description.class_names, description.data)
        if run == path:
            _check_same_teachers(path, before, description)


def _check_same_teachers(path: pathlib.Path, before: RunDescription, now: RunDescription) -> None:
    for old, new in zip(before.teachers, now.teachers, strict=True):
        if old.sha256 != new.sha256:
            raise UserError(
                f"method.teachers: the weights in {new.source} are not those that the run in {path} "
                f"started with: put them back, or choose another --workdir"
            )


def _reads_the_same(path: pathlib.Path, config: FrozenConfigDict) -> bool:
    """Return whether the run in `path` asked for the same examples as `config`."""
    stored = read_json(path / CONFIG, A_RUN)["data"]
    return all(stored.get(knob) == config.data[knob] for knob in CHOOSE_EXAMPLES)


def check_same_data(
    path: pathlib.Path, before: RunDescription, class_names: Sequence[str], data: DataDescription
) -> None:
    """Raise UserError unless data has the classes and examples that the run in `path` started with."""
    old = before.data
    if old == data and before.class_names == tuple(class_names):
        return
    lost = [name for name in before.class_names if name not in class_names]
    new = [name for name in class_names if name not in before.class_names]
    changes = [f"{what} class {listed(names)}" for what, names in (("no", lost), ("new", new)) if names]
    if not changes and before.class_names != tuple(class_names):
        changes = [f"its classes are in another order, {listed(class_names)}"]
    for field in ("train_examples", "validation_examples", "test_examples"):
        there, here = getattr(old, field, 0), getattr(data, field)
        if there != here:
            changes.append(f"{field.replace('_', ' ')}: {there} then, {here} now")
    raise UserError(
        f"the data set {data.name} is not the one that the run in {path} was started with "
        f"({'; '.join(changes) or 'other images'}): put it back, or choose another --workdir"
    )


def claim(path: pathlib.Path, config: FrozenConfigDict) -> None:
    """Write the configuration into the directory, before anything else; it has been checked."""
    if parallel.is_main() and not (path / CONFIG).exists():
        write_json(path / CONFIG, to_dict(config))


def write_description(path: pathlib.Path, description: RunDescription) -> None:
    """Write what the run trains, and append to the list of environments it ran in."""
    write_record(path / STUDENTS, description)
    before, now = read_environments(path), environment()
    write_json(path / ENVIRONMENT, [*before, now])
    last = before[-1] if before else now
    changed = [f"{k} {now[k]} (was {last.get(k)})" for k in now if k != "started" and now[k] != last.get(k)]
    if changed:
        logger.warning(
            f"not all is as at the last start, so the last bits may differ: {', '.join(changed)}"
        )


def read_environments(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the environments that a run was started in; of a damaged file none, with a warning."""
    if not (path / ENVIRONMENT).exists():
        return []
    try:
        log = read_json(path / ENVIRONMENT, A_RUN)
        if isinstance(log, list) and all(isinstance(entry, dict) for entry in log):
            return log
        problem = "it does not hold a list of environments"
    except UserError as error:
        problem = str(error)
    logger.warning(f"{path / ENVIRONMENT} is begun anew: {problem}")
    return []


def environment() -> dict[str, Any]:
    """Return versions, devices and time."""
    devices = jax.devices()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
