"""Plans: the runs that must be complete before a method's own run, and what they decide for it.

An earlier run is a run like any other, in `earlier/<name>` of the directory of the run that needs it. If it
is complete, it is only read, so a plan that was killed resumes in whichever run it had reached.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from ekd_jax.common.errors import UserError
from ekd_jax.common.log import logger
from ekd_jax.config.build import build_method, build_networks
from ekd_jax.config.resolve import resolve
from ekd_jax.data.dataset import Source
from ekd_jax.data.opening import facts
from ekd_jax.methods.base import EARLIER
from ekd_jax.methods.self_distillation import member_names
from ekd_jax.methods.srm import DICTIONARIES, INITIALIZE, check_map_sizes
from ekd_jax.models.members import parse_students
from ekd_jax.runs import workdir
from ekd_jax.runs.history import Permit, read_history
from ekd_jax.runs.records import SUMMARY, Summary
from ekd_jax.runs.teachers import check_fit, network_of
from ekd_jax.training import single
from ekd_jax.training.loop import Watch
from ekd_jax.training.width_search import widths_within

Runs = dict[pathlib.Path, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs that a method needs before its own.

    Attributes:
        earlier: (resolved configuration, run directory) -> name -> configuration of each earlier run, in
            order, not resolved yet. They may use each other's directories, as teachers or initial weights.
        settle: (resolved configuration, run directory) -> the configuration of the method's own run. It is
            called when all earlier runs are complete, and fills in what they decide.
    """

    earlier: Callable[[Any, pathlib.Path], Mapping[str, Mapping[str, Any]]] = lambda config, path: {}
    settle: Callable[[Any, pathlib.Path], Any] = lambda config, path: config


def runs(config: FrozenConfigDict, path: pathlib.Path) -> Runs:
    """Return all runs that `config` stands for, in order: run directory -> resolved configuration.

    The last entry is the run itself, in `path`. Values that earlier runs decide are filled in once those
    runs are complete.
    """
    plan = PLANS.get(config.method.name, Plan())
    earlier = {path / EARLIER / name: resolve(run) for name, run in plan.earlier(config, path).items()}
    if earlier and all((directory / SUMMARY).exists() for directory in earlier):
        config = resolve(plan.settle(config, path))
    return {**earlier, path: config}


def check(planned: Runs, permit: Permit | None = None) -> None:
    """Raise UserError if a directory holds something other than its run.

    A change of a run that goes on is one of its own steps: earlier runs that are complete stay as they are.

    Args:
        planned: as `runs` returns it.
        permit: what of the last run's configuration may change.
    """
    *earlier, last = planned
    changed = permit or read_history(last)
    for directory in earlier:
        if not (changed and (directory / SUMMARY).exists()):
            workdir.check(directory, planned[directory])
    workdir.check(last, planned[last], permit)


def run(
    config: FrozenConfigDict,
    path: pathlib.Path,
    mesh: Mesh | None = None,
    source: Source | None = None,
    permit: Permit | None = None,
    profile: int = 0,
    watch: Watch = lambda epoch, evaluation: None,
) -> Summary:
    """Train or resume all runs of the plan and return the summary of the last one.

    For the arguments and errors see `single.run`.
    """
    *earlier, _ = planned = runs(config, path)
    if not earlier:
        return single.run(config, path, mesh, source, permit, profile, watch)
    check(planned, permit)
    for number, directory in enumerate(earlier, 1):
        if not (directory / SUMMARY).exists():
            logger.info(f"run {number} of {len(planned)}: {directory.name}")
            single.run(planned[directory], directory, mesh, source)
    if not (path / SUMMARY).exists():
        logger.info(f"run {len(planned)} of {len(planned)}")
    return single.run(runs(config, path)[path], path, mesh, source, permit, profile, watch)


# --- SRM: dictionaries of the teacher's feature maps, then a student that predicts them -----------


def _srm_earlier(config: FrozenConfigDict, path: pathlib.Path) -> dict[str, Any]:
    own, sources = config.method, build_method(config).teacher_sources
    number = len(parse_students(config.model.students))
    if (number, len(sources)) != (1, 1):
        raise UserError(
            f"srm trains one student from one teacher, not {number} from {len(sources)}: pass one of "
            f"each, as in --config.model.students='(1,)'"
        )
    network, preprocessing, class_names = network_of(sources[0], path)
    if known := facts(config):
        check_fit(sources[0], class_names, network.input_shape, known)

    first, second = config.to_dict(), config.to_dict()
    first["method"] = {
        "name": "srm_dictionaries",
        "codeword_multiplier": own.codeword_multiplier,
        "sparsity_multiplier": own.sparsity_multiplier,
    }
    first["model"] |= {
        **network.options,
        "name": network.name,
        "students": (tuple(network.widths),),
        **{"sharing": "", "compressed_stages": 0, "shared_stages": -1},
        "frozen_stages": -1,
        "initial_weights": sources[0],
    }
    first["data"] |= {"mean": preprocessing.mean, "std": preprocessing.std}
    first["train"] |= {
        "epochs": own.dictionary_epochs,
        "batch_size": own.dictionary_batch_size or config.train.batch_size,
        "dtype": network.dtype,
    }
    first["optimizer"] |= _adam(own.dictionary_learning_rate, 0.0, 10, 60, 30)

    second["method"] = {
        "name": "srm_initialize",
        "teachers": (str(path.absolute() / EARLIER / DICTIONARIES),),
        "labels": own.labels,
        "sparsity_multiplier": own.sparsity_multiplier,
    }
    second["train"] |= {
        "epochs": own.initialize_epochs,
        "batch_size": own.initialize_batch_size or config.train.batch_size,
    }
    second["optimizer"] |= _adam(own.initialize_learning_rate, own.initialize_weight_decay, 30, 100, 30)
    for earlier in (first, second):
        earlier["model"]["last_map"] = "stage"  # the maps that a frozen teacher gives
        earlier["train"]["patience_epochs"] = 0.0  # accuracy does not tell when they have learned enough
    taught, learning = (
        [
            row[0]
            for row in build_networks(
                resolve(run), network.num_classes, network.input_shape
            ).trace.outputs.features
        ]
        for run in (first, second)
    )
    check_map_sizes(learning, taught)
    return {DICTIONARIES: first, INITIALIZE: second}


def _srm_settled(config: FrozenConfigDict, path: pathlib.Path) -> Any:
    settled = config.to_dict()
    settled["model"]["initial_weights"] = f"{EARLIER}/{INITIALIZE}"
    return settled


def _adam(rate: float, weight_decay: float, *epochs: float) -> dict[str, Any]:
    """Return optimizer settings whose rate falls to a tenth after each of three durations but the last."""
    first, second, third = epochs
    total = first + second + third
    return {
        "name": "adam",
        "learning_rate": rate,
        "weight_decay": weight_decay,
        **{"b1": 0.9, "b2": -1.0, "epsilon": -1.0},
        **{"schedule": "steps", "decay_factor": 0.1, "decay_every_epochs": 0.0},
        "milestones": (first / total, (first + second) / total),
    }


# --- block-wise compression: a search for the widths, then a network of those widths --------------


def _blockwise_earlier(config: FrozenConfigDict, path: pathlib.Path) -> dict[str, Any]:
    search = config.to_dict()
    own = ("budget", "search_epochs")
    search["method"] = {name: value for name, value in search["method"].items() if name not in own}
    search["method"]["name"] = "blockwise_search"
    search["model"]["students"] = (1,)
    search["train"]["epochs"] = config.method.search_epochs or config.train.epochs
    search["train"]["patience_epochs"] = 0.0  # it is done when the penalty has worked, not accuracy
    return {"search": search}


def _blockwise_settled(config: FrozenConfigDict, path: pathlib.Path) -> Any:
    found = widths_within(path / EARLIER / "search", config.method.budget, config.method.cost)
    settled = config.to_dict()
    settled["model"]["students"] = (found,)
    return settled


# --- self- and ensemble distillation: networks that differ in their seed alone --------------------


def _members(config: FrozenConfigDict, path: pathlib.Path) -> dict[str, Any]:
    names = member_names(config.method.members)
    return {name: alone(config, seed=config.seed + k) for k, name in enumerate(names, 1)}


def alone(config: FrozenConfigDict, seed: int) -> dict[str, Any]:
    """Return the configuration that trains the network of student 1 by itself."""
    asked = config.model.students
    run = config.to_dict()
    run["seed"] = seed
    run["method"] = {"name": "baseline"}
    run["model"]["students"] = (asked[0],) if isinstance(asked, tuple) else (1,)
    run["model"]["sharing"] = ""
    return run


PLANS: dict[str, Plan] = {
    "srm": Plan(_srm_earlier, _srm_settled),
    "blockwise": Plan(_blockwise_earlier, _blockwise_settled),
    "self_distillation": Plan(_members),
    "ensemble_distillation": Plan(_members),
}
