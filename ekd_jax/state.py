"""What is trained, and how it begins."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from ekd_jax import models
from ekd_jax.config import make_method, network_options
from ekd_jax.errors import UserError
from ekd_jax.methods.base import Method
from ekd_jax.models.ensemble import Ensemble, Variables, parse_students
from ekd_jax.models.layers import draw, trace


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on, and everything that is checkpointed.

    Attributes:
        step: int32 scalar, steps taken.
        params: `base`, `students/<i>`, `method`.
        batch_stats: the same sub-trees.
        opt_state: of the optimiser.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> Variables:
        return {"params": self.params, "batch_stats": self.batch_stats}


def build(config: Any, num_classes: int, devices: int = 1) -> Ensemble:
    """The ensemble that `config` asks for, trained on so many devices."""
    return models.build(
        config.model.name,
        parse_students(config.model.students),
        num_classes,
        config.train.dtype,
        base_gradients=make_method(config).base_gradients,
        batch_norm_groups=devices if config.model.batch_norm == "local" else 1,
        **network_options(config),
    )


def init_variables(
    ensemble: Ensemble, method: Method, seed: int | None, input_shape: tuple[int, ...]
) -> Variables:
    """Initial variables of students and method, as numpy arrays; shapes alone with None for a seed."""
    variables = ensemble.init(seed, input_shape)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    own = draw(trace(method, ensemble.shapes(input_shape), labels).variables, seed, "method")
    return {kind: {**tree, "method": own.get(kind, {})} for kind, tree in variables.items()}


def begin_with(state: TrainState, variables: Variables, source: str) -> TrainState:
    """The state with base block and student 1 taken from `variables` of a student; a classifier of another
    number of classes stays as it is.

    Args:
        state: before the first step.
        variables: `{"params": {"base", "branch"}, "batch_stats": same}`.
        source: where they are from, for the error.

    Raises:
        UserError: they are of another network.
    """

    def filled(path: Any, leaf: Any, given: Any) -> Any:
        names = [key.key for key in path]
        if given.shape == leaf.shape:
            return given
        if names[:3] == ["branch", "head", "linear"]:
            return leaf
        raise UserError(
            f"model.initial_weights={source}: {'/'.join(names)} has shape {given.shape}, this network "
            f"{leaf.shape}: take a student of the same network and width"
        )

    trees = {}
    for kind, tree in (("params", state.params), ("batch_stats", state.batch_stats)):
        own = {"base": tree["base"], "branch": tree["students"]["1"]}
        if flatten_dict(own).keys() != flatten_dict(variables[kind]).keys():
            raise UserError(
                f"model.initial_weights={source} is of another network: take one of the same name"
            )
        new = jax.tree_util.tree_map_with_path(filled, own, variables[kind])
        trees[kind] = {**tree, "base": new["base"], "students": {**tree["students"], "1": new["branch"]}}
    return dataclasses.replace(state, **trees)


def init_state(
    ensemble: Ensemble,
    method: Method,
    optimizer: optax.GradientTransformation,
    seed: int,
    input_shape: tuple[int, ...],
) -> TrainState:
    """The state before the first step, as numpy arrays."""
    variables = init_variables(ensemble, method, seed, input_shape)
    shapes = jax.eval_shape(optimizer.init, variables["params"])
    # every optimiser begins at zero everywhere: nothing to compute.
    opt_state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return TrainState(np.zeros((), np.int32), variables["params"], variables["batch_stats"], opt_state)
