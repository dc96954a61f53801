"""The runs of a comparison: which there are, whether they can be, and training one after the other.

What a comparison is says `ekd_jax.compare`, the command.
"""

import contextlib
import dataclasses
import gc
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError, nearest
from ekd_jax.common.text import clock
from ekd_jax.config.build import make_ensemble, make_method
from ekd_jax.config.knobs import KNOBS
from ekd_jax.config.resolve import resolve, result_fields, to_dict
from ekd_jax.data.opening import known_facts
from ekd_jax.methods.base import EARLIER
from ekd_jax.runs.describe import describe
from ekd_jax.runs.teachers import load_teachers
from ekd_jax.runs.workdir import SUMMARY
from ekd_jax.training import plans as stages
from ekd_jax.training.optimizer import make_optimizer
from ekd_jax.training.setup import check_batches, steps_in

PARTS = ("common", "seeds", "methods", "allow")
Folders = Mapping[str, pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        label: the row of the table that it counts for.
        path: its folder.
        config: resolved.
        needs: folders of the runs that it refers to, by label.
    """

    label: str
    path: pathlib.Path
    config: Any
    needs: Folders

    @property
    def complete(self) -> bool:
        return (self.path / SUMMARY).exists()

    @property
    def ready(self) -> bool:
        """Whether all that it needs is complete."""
        return all((path / SUMMARY).exists() for path in self.needs.values())

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / SUMMARY).read_text())
        return found

    def seconds(self) -> float:
        """What it took, its stages included; for a complete one."""
        files = [self.path / SUMMARY, *self.path.glob(f"{EARLIER}/*/{SUMMARY}")]
        return sum(sum(json.loads(file.read_text())["seconds"].values()) for file in files)

    def check(self) -> None:
        """Raises UserError unless it may begin or go on in its folder; what it needs is complete."""
        stages.check(stages.runs(self.config, self.path))


# --- which runs there are ------------------------------------------------------------------------


def plan(
    asked: Mapping[str, Any] | ConfigDict, workdir: pathlib.Path, seeds: int | None = None
) -> list[Run]:
    """All runs in their order: every label once with the first seed, then with the next.

    Args:
        asked: what the file of the comparison gives.
        workdir: of the comparison.
        seeds: how many, instead of the file's.

    Raises:
        UserError: a label, knob or value that cannot be, or one that would make the comparison unfair.
    """
    parts = _checked(asked)
    common, methods = parts["common"].to_dict(), parts["methods"]
    first = resolve(common).seed
    runs = []
    for seed in range(first, first + (seeds or parts["seeds"])):
        folders = {label: workdir / label / f"seed{seed}" for label in methods}
        for label, knobs in methods.items():
            with _about(f"label {label}"):
                own, needs = _filled(knobs, label, folders)
                config = resolve({**common, "seed": seed, **own}, own)
                _check_fair(resolve({**common, "seed": seed}), config, parts["allow"])
                runs.append(Run(label, folders[label], config, needs))
    return runs


def _checked(asked: Any) -> dict[str, Any]:
    """The parts of a comparison's file."""
    parts = {"seeds": 3, "allow": (), **asked}
    if not all(isinstance(parts.get(name), Mapping | ConfigDict) for name in ("common", "methods")):
        raise UserError(
            "the config is not that of a comparison: its get_config must give 'common' and 'methods', as "
            "that of configs/compare_digits.py does; single runs are trained with ekd_jax.main"
        )
    for name in parts:
        if name not in PARTS:
            raise UserError(f"unknown part {name!r} of a comparison{nearest(name, PARTS)}")
    if not isinstance(parts["seeds"], int) or parts["seeds"] < 1:
        raise UserError(f"seeds={parts['seeds']!r} of the comparison must be a number, at least 1")
    if not parts["methods"]:
        raise UserError("methods of the comparison is empty: give it a label")
    for label in parts["methods"]:
        if not re.fullmatch(r"\w[\w.+-]*", label):
            raise UserError(f"label {label!r} names a folder: it must be of letters, digits, and _ . + -")
    for name in parts["allow"]:
        if name not in KNOBS or name == "seed":
            choices = [knob for knob in KNOBS if _is_guarded(knob) and knob != "seed"]
            raise UserError(f"allow: {name!r} is not a knob that can be allowed{nearest(name, choices)}")
    return {**parts, "common": ConfigDict(parts["common"])}


def _filled(knobs: Mapping[str, Any], label: str, folders: Folders) -> tuple[dict[str, Any], Folders]:
    """The knobs of a label with the folders of other labels in place of their names, and these folders."""
    before = list(folders)[: list(folders).index(label)]
    needs: dict[str, pathlib.Path] = {}

    def folder(match: re.Match[str]) -> str:
        name = match[1]
        if name not in folders:
            raise UserError(f"{match[0]}: there is no label {name!r}{nearest(name, folders)}")
        if name not in before:
            raise UserError(f"{match[0]}: {name} comes later; teachers must come before their students")
        needs[name] = folders[name]
        return str(folders[name])

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return re.sub(r"\{([^{}]*)\}", folder, value)
        return tuple(map(fill, value)) if isinstance(value, list | tuple) else value

    return {name: fill(value) for name, value in knobs.items()}, needs


def _check_fair(common: Any, config: Any, allowed: Sequence[str]) -> None:
    """Raises UserError if a run has another network, other data, epochs or another seed than the rest."""
    ours, its = (result_fields(to_dict(c)) for c in (common, config))
    for name, value in its.items():
        if _is_guarded(name) and value != ours[name] and name not in allowed:
            raise UserError(
                f"{name}={value} would make the comparison unfair, the others have {ours[name]}: leave it "
                f'out, or list it as in "allow": ("model.name",)'
            )


def _is_guarded(knob: str) -> bool:
    return knob.startswith("data.") or knob in ("train.epochs", "seed", "model.name")


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    """An error says what it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def selected(runs: list[Run], labels: Sequence[str]) -> list[Run]:
    """The runs of some labels, and those that they refer to.

    Raises:
        UserError: there is no such label.
    """
    known = dict.fromkeys(run.label for run in runs)
    for label in labels:
        if label not in known:
            raise UserError(f"--methods: there is no label {label!r}{nearest(label, known)}")
    wanted = set(labels)
    for run in reversed(runs):
        if run.label in wanted:
            wanted |= run.needs.keys()
    return [run for run in runs if run.label in wanted]


# --- before and while they are trained -----------------------------------------------------------


def check_existing(runs: list[Run]) -> None:
    """Raises UserError if a folder holds something else than its run."""
    for run in runs:
        if run.ready:
            with _about(f"label {run.label}"):
                run.check()


def check(runs: list[Run]) -> None:
    """Finds what would end a run that is not complete, as far as it can be known now. Writes nothing.

    Raises:
        UserError: as `train.run`.
    """
    seen: set[str] = set()
    for run in runs:
        if run.complete or run.label in seen:
            continue
        seen.add(run.label)
        with _about(f"label {run.label}"):
            config, method, known = run.config, make_method(run.config), known_facts(run.config)
            mesh = parallel.make_mesh(fsdp=config.train.fsdp)
            check_batches(config, mesh, known.train_examples)
            make_optimizer(config, method, steps_in(config.train.epochs, config, known.train_examples))
            outside = [source for source in method.teacher_sources if not _inside(source, run, runs)]
            taught = None if method.teacher_sources else ()
            describe(config, known.input_shape, known.num_classes, taught)
            load_teachers(outside, run.path, known.num_classes, known.input_shape)


def _inside(source: str, run: Run, runs: list[Run]) -> bool:
    """Whether a teacher is one of the comparison's, or of the run's own stages.

    Raises:
        UserError: it is a student that a run of the comparison does not have.
    """
    name, _, number = source.rpartition(":")
    for label, path in run.needs.items():
        if str(path) not in (source, name):
            continue
        config = next(other.config for other in runs if other.path == path)
        each = len(make_ensemble(config, num_classes=1).students)
        students = each * max(1, make_method(config).number_of_copies)
        if source != str(path) and number not in map(str, range(1, students + 1)):
            raise UserError(f"method.teachers: {source}: label {label} has students 1 to {students}")
        return True
    return source.startswith(f"{EARLIER}/")


def train_all(runs: list[Run]) -> None:
    """Trains the runs that are not complete, in order; all they print goes to standard error.

    Raises:
        UserError: as `train.run`.
        SystemExit: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    for number, run in enumerate(runs, 1):
        name = f"{run.label}, seed {run.config.seed}"
        with _about(name):
            if run.complete:
                run.check()
                continue
            left = time_left(runs)
            about = f", about {clock(left)} left" if left else ""
            print(f"run {number} of {len(runs)}: {name}{about}", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(sys.stderr):
                stages.run(run.config, run.path)
            gc.collect()  # compiled programs are part of reference cycles


def time_left(runs: list[Run]) -> float:
    """Seconds, by what complete runs took, of the same label if there are any; 0 before the first."""
    took: dict[str, list[float]] = {}
    for run in runs:
        if run.complete:
            took.setdefault(run.label, []).append(run.seconds())
    means = {label: statistics.fmean(seconds) for label, seconds in took.items()}
    usual = statistics.fmean(means.values()) if means else 0.0
    return sum(means.get(run.label, usual) for run in runs if not run.complete)
