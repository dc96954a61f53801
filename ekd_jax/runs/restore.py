"""What a finished or running run has learned, read back from its folder."""

import dataclasses
import pathlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from ekd_jax.config.build import make_ensemble, make_method, network_options
from ekd_jax.methods.base import Method
from ekd_jax.models.ensemble import Ensemble, EnsembleTrace, Variables
from ekd_jax.runs import checkpoint
from ekd_jax.runs.state import deployed, deployed_names, joined, of_method
from ekd_jax.runs.workdir import Run, read

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Restored:
    """The networks of a run at a step.

    Attributes:
        run: its folder and configuration.
        ensemble: the networks.
        method: how they learned.
        step: of the checkpoint.
        variables: all that predictions depend on, numpy arrays.
        digests: SHA-256 of every array of the checkpoint.
    """

    run: Run
    ensemble: Ensemble
    method: Method
    step: int
    variables: Variables
    digests: dict[str, str]

    @cached_property
    def trace(self) -> EnsembleTrace:
        """The networks traced on an image of the run."""
        return self.ensemble.trace(self.run.students["input_shape"])

    @property
    def names(self) -> list[str]:
        """Of all that predicts."""
        return deployed_names(self.trace, self.method)

    @property
    def predict(self) -> Callable[[Variables, Array], Array]:
        return predictor(self.ensemble, self.method)


def restore(path: pathlib.Path, step: int | None = None, best_by: str | None = None) -> Restored:
    """Reads a checkpoint of a run; the latest, unless `Checkpoints.choose` is told otherwise.

    Raises:
        UserError: no such run or checkpoint; it is damaged.
    """
    run = read(path)
    method = make_method(run.config)
    ensemble = make_ensemble(run.config, run.students["num_classes"])
    with checkpoint.opened(path) as checkpoints:
        step = checkpoints.choose(step, best_by)
        shapes = checkpoints.shapes(step)
        like = {kind: shapes.get(kind, {}) for kind in ("params", "batch_stats", "copies")}
        variables, remembered = checkpoints.restore_variables(like, step)
    for kind in ("params", "batch_stats"):
        variables[kind].setdefault("method", {})
    return Restored(run, ensemble, method, step, variables, remembered["sha256"])


def predictor(ensemble: Ensemble, method: Method) -> Callable[[Variables, Array], Array]:
    """(variables, images) -> logits (P, B, K) of all that predicts, named by `deployed_names`."""

    def predict(variables: Variables, images: Array) -> Array:
        outputs = joined([ensemble.apply(v, images, train=False)[0] for v in deployed(variables)])
        predictions: Any = method.apply(of_method(variables), outputs, method="predictions")
        return jnp.stack(predictions)

    return predict


def architecture(run: Run, ensemble: Ensemble, member: int) -> dict[str, Any]:
    """What makes the network of a run's student anew; `member` counts the ensemble's students from 0."""
    return {
        "name": ensemble.students[member].network or run.config.model.name,
        "widths": [str(width) for width in ensemble.widths[member]],
        "num_classes": run.students["num_classes"],
        "input_shape": run.students["input_shape"],
        "dtype": run.config.train.dtype,
        "options": network_options(run.config),
    }
