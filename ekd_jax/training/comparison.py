"""A comparison of methods: its runs, and the checks before they are trained.

`ekd_jax/compare.py`, the command, describes the file of a comparison.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError, about, nearest
from ekd_jax.common.log import logger
from ekd_jax.common.records import read_record
from ekd_jax.config.build import build_networks
from ekd_jax.config.knobs import KNOBS
from ekd_jax.config.resolve import read_config, resolve, result_fields, steps_in, to_dict
from ekd_jax.data.labels import check_class_weights
from ekd_jax.data.opening import known_facts
from ekd_jax.methods.base import EARLIER
from ekd_jax.runs.describe import describe
from ekd_jax.runs.history import Permit
from ekd_jax.runs.records import A_RUN, CONFIG, STUDENTS, SUMMARY, RunDescription, Summary
from ekd_jax.runs.teachers import load_teachers
from ekd_jax.runs.workdir import is_run, read_summary, seed_directory, seed_runs
from ekd_jax.training import plans
from ekd_jax.training.optimizer import make_optimizer
from ekd_jax.training.setup import check_batches

PARTS = ("common", "seeds", "methods", "allow")
Directories = Mapping[str, pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of a comparison.

    Attributes:
        label: the row of the table that it belongs to.
        path: its directory.
        config: its complete configuration.
        needs: directories of the runs that it refers to, by label.
    """

    label: str
    path: pathlib.Path
    config: FrozenConfigDict
    needs: Directories

    @property
    def complete(self) -> bool:
        """True if the run has been trained to its end."""
        return (self.path / SUMMARY).exists()

    @property
    def ready(self) -> bool:
        """True if every run that this one needs is complete."""
        return all((path / SUMMARY).exists() for path in self.needs.values())

    def summary(self) -> Summary:
        """Return the summary of a complete run."""
        return read_summary(self.path)

    def seconds(self) -> float:
        """Return what a complete run took, earlier runs of its plan included."""
        files = [self.path / SUMMARY, *self.path.glob(f"{EARLIER}/*/{SUMMARY}")]
        return sum(sum(read_record(file, Summary, A_RUN).seconds.values()) for file in files)

    def check(self, permit: Permit | None = None) -> None:
        """Raise UserError unless it may start or resume in its directory; what it needs is complete."""
        plans.check(plans.runs(self.config, self.path), permit)


# --- which runs there are ------------------------------------------------------------------------


def entries(
    asked: Mapping[str, Any] | ConfigDict, workdir: pathlib.Path, seeds: int | None = None
) -> list[Entry]:
    """Return all runs in their order: every label once with the first seed, then with the next.

    Args:
        asked: what the file of the comparison returns.
        workdir: directory of the comparison.
        seeds: how many, instead of the file's number.

    Raises:
        UserError: a label, knob or value that is not possible, or one that would make the comparison unfair.
    """
    parts = _checked(asked)
    common, methods = parts["common"].to_dict(), parts["methods"]
    first = resolve(common).seed
    found = []
    for seed in range(first, first + (seeds or parts["seeds"])):
        directories = {label: seed_directory(workdir / label, seed) for label in methods}
        for label, knobs in methods.items():
            with about(f"label {label}"):
                own, needs = _filled(knobs, label, directories)
                config = resolve({**common, "seed": seed, **own}, own)
                _check_fair(resolve({**common, "seed": seed}), config, parts["allow"])
                found.append(Entry(label, directories[label], config, needs))
    return found


def _checked(asked: Any) -> dict[str, Any]:
    """Return the parts of a comparison's file, checked."""
    parts = {"seeds": 3, "allow": (), **asked}
    if not all(isinstance(parts.get(name), Mapping | ConfigDict) for name in ("common", "methods")):
        raise UserError(
            "this is not the config of a comparison: its get_config must return 'common' and 'methods', as "
            "configs/compare_digits.py does; a single run is trained with ekd_jax.main"
        )
    for name in parts:
        if name not in PARTS:
            raise UserError(f"unknown part {name!r} of a comparison{nearest(name, PARTS)}")
    if not isinstance(parts["seeds"], int) or parts["seeds"] < 1:
        raise UserError(f"seeds={parts['seeds']!r} of the comparison must be a number, at least 1")
    if parts["common"].get("seeds"):
        raise UserError(
            "common.seeds of the comparison: how many seeds there are is its part 'seeds': leave it out"
        )
    if not parts["methods"]:
        raise UserError("methods of the comparison is empty: give it a label")
    for label in parts["methods"]:
        if not re.fullmatch(r"\w[\w.+-]*", label):
            raise UserError(
                f"label {label!r} names a directory: it must consist of letters, digits, and _ . + -"
            )
    for name in parts["allow"]:
        if name not in KNOBS or name == "seed":
            choices = [knob for knob in KNOBS if _is_guarded(knob) and knob != "seed"]
            raise UserError(f"allow: {name!r} is not a knob that can be allowed{nearest(name, choices)}")
    return {**parts, "common": ConfigDict(parts["common"])}


def _filled(
    knobs: Mapping[str, Any], label: str, directories: Directories
) -> tuple[dict[str, Any], Directories]:
    """Return the knobs of a label with directories in place of other labels' names, and these directories."""
    before = list(directories)[: list(directories).index(label)]
    needs: dict[str, pathlib.Path] = {}

    def directory(match: re.Match[str]) -> str:
        name = match[1]
        if name not in directories:
            raise UserError(f"{match[0]}: there is no label {name!r}{nearest(name, directories)}")
        if name not in before:
            raise UserError(f"{match[0]}: {name} comes later; teachers must come before their students")
        needs[name] = directories[name]
        return str(directories[name])

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return re.sub(r"\{([^{}]*)\}", directory, value)
        return tuple(map(fill, value)) if isinstance(value, list | tuple) else value

    return {name: fill(value) for name, value in knobs.items()}, needs


def _check_fair(common: Any, config: FrozenConfigDict, allowed: Sequence[str]) -> None:
    """Raise UserError if a run has another network, other data, epochs or another seed than the rest."""
    if unfair := _unfair(common, config, allowed):
        name, others, value = unfair
        raise UserError(
            f"{name}={value} would make the comparison unfair, the others have {others}: leave it "
            f'out, or list it as in "allow": ("model.name",)'
        )


def _unfair(common: Any, config: FrozenConfigDict, allowed: Sequence[str]) -> tuple[str, Any, Any] | None:
    """Return a knob that must be equal and is not, with both values; None if there is none."""
    ours, its = (result_fields(to_dict(c)) for c in (common, config))
    different = (
        (name, ours.get(name), value)
        for name, value in its.items()
        if _is_guarded(name) and value != ours.get(name) and name not in allowed
    )
    return next(different, None)


def _is_guarded(knob: str) -> bool:
    return knob.startswith("data.") or knob in (
        *("train.epochs", "train.patience_epochs", "seed", "model.name"),
    )


def selected(runs: list[Entry], labels: Sequence[str]) -> list[Entry]:
    """Return the runs of some labels, and those that they refer to.

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


# --- runs that are there --------------------------------------------------------------------------


def existing(paths: Sequence[pathlib.Path], allowed: Sequence[str] = ()) -> list[Entry]:
    """Return the complete runs in some directories, which are comparable; runs that differ in their seed alone share
    a label.

    Args:
        paths: of runs, and of directories with a run for each seed. A label is the first path of its runs.
        allowed: knobs of network, data and epochs that may differ.

    Raises:
        UserError: a directory has no complete run; runs read different data; a comparison would be unfair.
    """
    found: list[Entry] = []
    labels: dict[str, str] = {}
    for path in paths:
        several = {} if is_run(path) else seed_runs(path)
        runs = [_existing_entry(str(path), run) for run in several.values() or [path]]
        if open_runs := [str(run.path) for run in runs if not run.complete]:
            logger.warning(f"left out, because not complete: {', '.join(open_runs)}")
        runs = [run for run in runs if run.complete]
        if not runs:
            raise UserError(f"{path} has no complete run: train it to its end first")
        kinds = {_without_seed(run) for run in runs}
        if len(kinds) > 1:
            raise UserError(f"the runs in {path} differ in more than their seed: name each by itself")
        label = labels.setdefault(kinds.pop(), str(path))
        found += [dataclasses.replace(run, label=label) for run in runs]
    _check_seeds_once(found)
    for run in found[1:]:
        if unfair := _unfair(found[0].config, run.config, [*allowed, "seed"]):
            knob, there, here = unfair
            raise UserError(
                f"{run.path} has {knob}={here}, and {found[0].path} has {there}: leave one out, or compare "
                f"nevertheless with --allow={knob}"
            )
        _check_same_data(found[0], run)
    return found


def _existing_entry(label: str, path: pathlib.Path) -> Entry:
    return Entry(label, path, read_config(path / CONFIG, A_RUN), {})


def _without_seed(run: Entry) -> str:
    """Return what a run computes, but for its seed; teachers of the same seed count as the same."""
    fields = result_fields(to_dict(run.config)) | {"seed": "*"}
    name = re.escape(seed_directory(pathlib.Path(), run.config.seed).name)
    return re.sub(rf"(?<=/){name}(?![0-9])", "seed*", json.dumps(fields, sort_keys=True))


def _check_seeds_once(runs: list[Entry]) -> None:
    seen: dict[tuple[str, int], Entry] = {}
    for run in runs:
        other = seen.setdefault((run.label, run.config.seed), run)
        if other is not run:
            raise UserError(
                f"{other.path} and {run.path} are runs of the same configuration and the same seed, "
                f"{run.config.seed}: name one of them"
            )


def _check_same_data(first: Entry, run: Entry) -> None:
    """Raise UserError unless two runs were trained and tested on the same examples."""
    ours, its = (read_record(r.path / STUDENTS, RunDescription, A_RUN).data for r in (first, run))
    if ours and its and ours != its:
        raise UserError(
            f"{run.path} does not have the data of {first.path} (other images, or other numbers of them): runs of "
            f"different data cannot be compared"
        )


# --- before they are trained ----------------------------------------------------------------------


def check_existing(runs: list[Entry]) -> None:
    """Raise UserError if a directory holds something other than its run."""
    for run in runs:
        if run.ready:
            with about(f"label {run.label}"):
                run.check()


def check(runs: list[Entry]) -> None:
    """Find errors that would end an incomplete run, as far as they can be known now. Nothing is written.

    Raises:
        UserError: as `single.run`.
    """
    seen: set[str] = set()
    for run in runs:
        if run.complete or run.label in seen:
            continue
        seen.add(run.label)
        with about(f"label {run.label}"):
            check_entry(run, runs)


def check_entry(run: Entry, runs: list[Entry]) -> None:
    """Find errors that would end one run, as far as they can be known now. Nothing is written.

    Args:
        run: that is to be trained.
        runs: those whose students it may have as teachers before they are trained.

    Raises:
        UserError: as `single.run`.
    """
    config, known = run.config, known_facts(run.config)
    check_batches(config, parallel.make_mesh(fsdp=config.train.fsdp), known.train_examples)
    check_class_weights(config, known)
    networks = build_networks(config, known.num_classes, known.input_shape)
    method = networks.method
    make_optimizer(config, method, steps_in(config.train.epochs, config, known.train_examples))
    outside = [source for source in method.teacher_sources if not _is_inside(source, run, runs)]
    describe(networks, config.model.name, None if method.teacher_sources else ())
    load_teachers(outside, run.path, known)


def _is_inside(source: str, run: Entry, runs: list[Entry]) -> bool:
    """Return whether a teacher is a run of the comparison, or an earlier run of the run's own plan.

    Raises:
        UserError: it is a student that a run of the comparison does not have.
    """
    name, _, number = source.rpartition(":")
    for label, path in run.needs.items():
        if str(path) not in (source, name):
            continue
        config = next(other.config for other in runs if other.path == path)
        students = build_networks(config, num_classes=1, input_shape=(1, 1, 1)).students
        if source != str(path) and number not in map(str, range(1, students + 1)):
            raise UserError(f"method.teachers: {source}: label {label} has students 1 to {students}")
        return True
    return source.startswith(f"{EARLIER}/")
