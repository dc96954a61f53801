"""What is trained, and how it begins."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from ekd_jax.common.errors import UserError
from ekd_jax.methods.base import Batch, Method, TeacherOutputs
from ekd_jax.models.ensemble import Ensemble, Outputs, Variables
from ekd_jax.models.initializers import draw, trace


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on, and everything that is checkpointed.

    Attributes:
        step: int32 scalar, steps taken.
        params: `base`, `students/<i>`, `method`.
        batch_stats: the same sub-trees.
        opt_state: of the optimizer.
        copies: of the networks, `{"1": {"params", "batch_stats"}, ...}`, if the method keeps any.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    copies: Any

    @property
    def variables(self) -> Variables:
        """All that predictions depend on."""
        return {"params": self.params, "batch_stats": self.batch_stats, "copies": self.copies}


def of_method(variables: Variables) -> Variables:
    """The method's own variables."""
    return {kind: variables[kind]["method"] for kind in ("params", "batch_stats")}


def of_networks(variables: Variables) -> Variables:
    """Everything but the method's own."""
    kinds = ("params", "batch_stats")
    return {kind: {name: t for name, t in variables[kind].items() if name != "method"} for kind in kinds}


def deployed(variables: Variables) -> list[Variables]:
    """The networks that predict: the copies, if there are any, or else those that learn."""
    copies = variables.get("copies", {})
    return [copies[name] for name in sorted(copies, key=int)] or [variables]


def joined(outputs: Sequence[Outputs]) -> Outputs:
    """The students of several ensembles as one."""
    if len(outputs) == 1:
        return outputs[0]
    logits = [o.logits_SxBxK for o in outputs]
    shape = (sum(len(z) for z in logits), *logits[0].shape[1:])
    only_shapes = isinstance(logits[0], jax.ShapeDtypeStruct)
    together: Any = jax.ShapeDtypeStruct(shape, logits[0].dtype) if only_shapes else jnp.concatenate(logits)
    features = tuple(sum(rows, ()) for rows in zip(*(o.features for o in outputs), strict=True))
    return Outputs(together, features, sum((o.pooled for o in outputs), ()), outputs[0].base)


def deployed_names(ensemble: Ensemble, method: Method, input_shape: Sequence[int]) -> list[str]:
    """Names of all that predicts when the networks that are deployed are evaluated."""
    return method.prediction_names(joined([ensemble.shapes(input_shape)] * max(1, method.number_of_copies)))


def trainable(method: Method, params: Any) -> Any:
    """The sub-trees of the parameters that learn."""
    return params if method.trains_networks else {"method": params["method"]}


def batch_shapes(
    ensemble: Ensemble, method: Method, input_shape: Sequence[int], teachers: Sequence[TeacherOutputs] = ()
) -> tuple[Outputs, Batch]:
    """What a method is called with for a batch of one image: shapes and dtypes."""
    outputs = ensemble.shapes(input_shape)
    labels: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
    epoch: Any = jax.ShapeDtypeStruct((), jnp.float32)
    return outputs, Batch(
        labels=labels,
        epoch=epoch,
        key=jax.eval_shape(lambda: jax.random.key(0)),
        teachers=tuple(teachers),
        copy_outputs=(outputs,) * method.number_of_copies if method.uses_copy_outputs else (),
        networks=ensemble.init(None, input_shape)["params"],
    )


def init_variables(
    ensemble: Ensemble,
    method: Method,
    seed: int | None,
    input_shape: Sequence[int],
    teachers: Sequence[TeacherOutputs] = (),
) -> Variables:
    """Initial variables of students and method, as numpy arrays; shapes alone with None for a seed.

    Args:
        ensemble: of the networks.
        method: whose own variables are made for them.
        seed: any non-negative integer.
        input_shape: H, W, C.
        teachers: the shapes of what frozen teachers give, if the method has any.
    """
    variables = ensemble.init(seed, input_shape)
    if method.same_initial_values:
        first = [str(ensemble.students.index(member) + 1) for member in ensemble.students]
        for tree in variables.values():
            tree["students"] = {str(i): tree["students"][own] for i, own in enumerate(first, 1)}
    given = batch_shapes(ensemble, method, input_shape, teachers)
    own = draw(trace(method, *given).variables, seed, "method")
    return {kind: {**tree, "method": own.get(kind, {})} for kind, tree in variables.items()}


def begin_with(state: TrainState, ensemble: Ensemble, variables: Variables, source: str) -> TrainState:
    """The state with student 1, and what it shares, taken from `variables` of a network; a classifier of
    another number of classes stays as it is.

    Args:
        state: before the first step.
        ensemble: that it is of.
        variables: as `Student` takes them.
        source: where they are from, for the error.

    Raises:
        UserError: they are of another network.
    """

    def filled(path: Any, leaf: Any, given: Any) -> Any:
        names = [key.key for key in path]
        if given.shape == leaf.shape:
            return given
        if names[1:3] == ["head", "linear"]:
            return leaf
        raise UserError(
            f"model.initial_weights={source}: {'/'.join(names[1:])} has shape {given.shape}, this network "
            f"{leaf.shape}: take a student of the same network and width"
        )

    networks = of_networks(state.variables)
    own = ensemble.alone(networks, 1)
    if flatten_dict(own).keys() != flatten_dict(variables).keys():
        raise UserError(f"model.initial_weights={source} is of another network: take one of the same name")
    new = jax.tree_util.tree_map_with_path(filled, own, variables)
    placed = ensemble.placed(networks, 1, new)
    placed = {kind: {**tree, "method": state.variables[kind]["method"]} for kind, tree in placed.items()}
    return _with_copies(dataclasses.replace(state, **placed))


def _with_copies(state: TrainState) -> TrainState:
    """Every copy begins as the networks do."""
    networks = of_networks(state.variables)
    return dataclasses.replace(
        state, copies={name: jax.tree.map(np.copy, networks) for name in state.copies}
    )


def init_state(
    ensemble: Ensemble,
    method: Method,
    optimizer: optax.GradientTransformation,
    seed: int,
    input_shape: tuple[int, ...],
    teachers: Sequence[TeacherOutputs] = (),
) -> TrainState:
    """The state before the first step, as numpy arrays; arguments as of `init_variables`."""
    variables = init_variables(ensemble, method, seed, input_shape, teachers)
    shapes = jax.eval_shape(optimizer.init, trainable(method, variables["params"]))
    # every optimizer begins at zero everywhere: nothing to compute.
    opt_state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    copies: dict[str, Any] = {str(i + 1): {} for i in range(method.number_of_copies)}
    return _with_copies(TrainState(np.zeros((), np.int32), **variables, opt_state=opt_state, copies=copies))
