"""The Python interface: train, load and evaluate without a command line.

Functions here log lines to the logger "ekd_jax" and raise `UserError` or `Interrupted`; they print nothing and
end no process.
"""

import contextlib
import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from ekd_jax.common.errors import UserError, nearest, reason
from ekd_jax.common.log import shown
from ekd_jax.config.knobs import default_config
from ekd_jax.config.resolve import resolve
from ekd_jax.data.dataset import Source
from ekd_jax.runs.history import Permit, branch
from ekd_jax.runs.records import Summary
from ekd_jax.training import plans, seeds
from ekd_jax.training.comparison_table import Row

__all__ = ["default_config", "load_recipe", "train", "train_seeds"]


def load_recipe(file: str | os.PathLike[str], argument: str | None = None) -> ConfigDict:
    """Load the configuration of a recipe, to be changed and trained.

    Args:
        file: such as "configs/digits.py", or with an argument "configs/resnet_cifar100.py:depth=110".
        argument: the part after the colon, if it is not in `file`.

    Raises:
        UserError: there is no such file, or it is not a recipe.
    """
    name, _, own = str(file).partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        others = sorted(str(p) for p in (path.parent.glob("*.py") if path.parent.is_dir() else ()))
        raise UserError(f"there is no recipe {path}{nearest(str(path), others) if others else ''}")
    spec = importlib.util.spec_from_file_location(f"ekd_jax_recipe_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config: ConfigDict = module.get_config(argument or own or None)
    except UserError:
        raise
    except Exception as error:  # a user's file may raise anything
        raise UserError(f"{path} is not a recipe with a get_config function: {reason(error)}") from error
    return config


def _resolved(
    config: Mapping[str, Any] | ConfigDict | FrozenConfigDict, data: Source | None
) -> FrozenConfigDict:
    asked = ConfigDict(config).to_dict()
    if data is not None:
        asked.setdefault("data", {})["name"] = data.name
    return resolve(asked)


def train(
    config: Mapping[str, Any] | ConfigDict | FrozenConfigDict,
    workdir: str | os.PathLike[str],
    data: Source | None = None,
    verbose: bool = True,
    extend: bool = False,
    from_run: str | os.PathLike[str] | None = None,
) -> Summary:
    """Train, or resume training, and return the summary.

    A method that needs earlier runs trains these first, in `workdir/earlier`. In the main thread Ctrl-C (SIGINT),
    SIGTERM and SIGHUP end training after a checkpoint; the same call resumes.

    Args:
        config: knobs that differ from their defaults; `default_config` and `load_recipe` return all of them.
        workdir: directory of the run, new, or with a run of the same configuration.
        data: images in memory, as `ekd_jax.data.from_arrays` returns them; `data.name` is set to theirs.
        verbose: show progress on standard error, unless the logger "ekd_jax" has handlers of its own.
        extend: a run in `workdir` goes on from where it stands, with this configuration.
        from_run: directory of a run that `workdir` becomes a copy of, to go on with this configuration.

    Raises:
        UserError: the configuration, the directory or the data is not possible; the loss is not finite.
        Interrupted: a signal came; a checkpoint was saved.
    """
    complete = _resolved(config, data)
    if complete.seeds:
        raise UserError(f"seeds={complete.seeds}: train_seeds trains several seeds, train one")
    with shown() if verbose else contextlib.nullcontext():
        path, permit = pathlib.Path(workdir), Permit("extend") if extend or from_run else None
        if from_run:
            branch(pathlib.Path(from_run), path)
        return plans.run(complete, path, source=data, permit=permit)


def train_seeds(
    config: Mapping[str, Any] | ConfigDict | FrozenConfigDict,
    workdir: str | os.PathLike[str],
    data: Source | None = None,
    verbose: bool = True,
    at_once: int = 1,
) -> Row:
    """Train, or resume, a run for each seed of `config.seeds`, and return mean and standard deviation over seeds.

    Each run is in a directory of its own, `workdir/seed<N>`. For the other arguments see `train`.

    Args:
        at_once: how many runs are trained at a time, each on its share of the devices.

    Returns:
        The statistics of all complete runs in `workdir`.

    Raises:
        UserError, Interrupted: as `train`.
    """
    complete = _resolved(config, data)
    if not complete.seeds:
        raise UserError("seeds is empty: give some, as in config.seeds = (0, 1, 2)")
    with shown() if verbose else contextlib.nullcontext():
        (row,) = seeds.run(complete, pathlib.Path(workdir), source=data, at_once=at_once).labels.values()
    return row
