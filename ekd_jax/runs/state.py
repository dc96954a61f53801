"""The train state: what is trained, how it is initialized, and which parts of it predict."""

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
from ekd_jax.common.log import logger
from ekd_jax.config.build import Networks
from ekd_jax.methods.base import Batch, TeacherOutputs
from ekd_jax.models.ensemble import Outputs, Variables
from ekd_jax.models.initializers import trace


@flax.struct.dataclass
class TrainState:
    """Everything that a run needs to resume, and everything that a checkpoint holds.

    Attributes:
        step: number of steps taken, int32 scalar.
        params: sub-trees `base`, `students/<i>` and `method`.
        batch_stats: the same sub-trees.
        opt_state: state of the optimizer.
        copies: copies of the networks, `{"1": {"params", "batch_stats"}, ...}`, if the method keeps any; or one
            moving average of all weights, those of the method's own layers included.
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


def method_variables(variables: Variables) -> Variables:
    """Return the variables of the method's own layers."""
    return {kind: variables[kind]["method"] for kind in ("params", "batch_stats")}


def network_variables(variables: Variables) -> Variables:
    """Return the variables of the networks, without those of the method's own layers."""
    kinds = ("params", "batch_stats")
    return {kind: {name: t for name, t in variables[kind].items() if name != "method"} for kind in kinds}


def deployed_variables(variables: Variables) -> list[Variables]:
    """Return the variables of the networks that predict: the copies if there are any, else the trained ones."""
    copies = variables.get("copies", {})
    return [copies[name] for name in sorted(copies, key=int)] or [variables]


def deployed_method_variables(variables: Variables) -> Variables:
    """Return the variables of the method's own layers that predict: their moving average if there is one."""
    (copy, *_) = deployed_variables(variables)
    if "method" not in copy["params"]:
        return method_variables(variables)
    return {kind: copy[kind].get("method", {}) for kind in ("params", "batch_stats")}


def joined_outputs(outputs: Sequence[Outputs]) -> Outputs:
    """Return the outputs of several ensembles, arrays or shapes, as those of one with all their students."""
    if len(outputs) == 1:
        return outputs[0]
    logits = [o.logits_SxBxK for o in outputs]
    shape = (sum(len(z) for z in logits), *logits[0].shape[1:])
    only_shapes = isinstance(logits[0], jax.ShapeDtypeStruct)
    together: Any = jax.ShapeDtypeStruct(shape, logits[0].dtype) if only_shapes else jnp.concatenate(logits)
    features = tuple(sum(rows, ()) for rows in zip(*(o.features for o in outputs), strict=True))
    return Outputs(together, features, sum((o.pooled for o in outputs), ()), outputs[0].base)


def predictor_names(networks: Networks) -> list[str]:
    """Return the names of everything that predicts when a run is evaluated: students, and last the ensemble."""
    copies = max(1, networks.number_of_copies)
    return networks.method.prediction_names(joined_outputs([networks.trace.outputs] * copies))


def trainable(networks: Networks, params: Any) -> Any:
    """Return the sub-trees of the parameters that are trained."""
    if not networks.method.trains_networks:
        return {"method": params["method"]}

    def learned(parts: Any) -> Any:
        return {name: part for name, part in parts.items() if name not in networks.frozen_parts}

    students = {number: learned(parts) for number, parts in params["students"].items()}
    return {**params, "base": learned(params["base"]), "students": students}


def merged(params: Any, learned: Any) -> Any:
    """Return the parameters with the sub-trees that `trainable` returned replaced by others like them."""
    if not isinstance(learned, dict):
        return learned
    return {**params, **{name: merged(params[name], tree) for name, tree in learned.items()}}


def batch_shapes(networks: Networks, teachers: Sequence[TeacherOutputs] = ()) -> tuple[Outputs, Batch]:
    """Return the shapes and dtypes that the method is called with for a batch of one image."""
    outputs, method = networks.trace.outputs, networks.method
    labels: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
    epoch: Any = jax.ShapeDtypeStruct((), jnp.float32)
    return outputs, Batch(
        labels=labels,
        epoch=epoch,
        key=jax.eval_shape(lambda: jax.random.key(0)),
        teachers=tuple(teachers),
        copy_outputs=(outputs,) * method.number_of_copies if method.uses_copy_outputs else (),
        networks=networks.trace.init(None)["params"],
    )


def init_variables(
    networks: Networks, seed: int | None, teachers: Sequence[TeacherOutputs] = ()
) -> Variables:
    """Initialize the variables of students and method.

    Args:
        networks: the students and the method.
        seed: any non-negative integer; None: shapes and dtypes only.
        teachers: shapes of the outputs of frozen teachers, if the method has any.

    Returns:
        `{"params", "batch_stats"}` with numpy arrays.
    """
    method, members = networks.method, networks.ensemble.students
    variables = networks.trace.init(seed)
    if method.same_initial_values:
        first = [str(members.index(member) + 1) for member in members]
        for tree in variables.values():
            tree["students"] = {str(i): tree["students"][own] for i, own in enumerate(first, 1)}
    given = batch_shapes(networks, teachers)
    own = trace(method, *given).init(seed, "method")
    return {kind: {**tree, "method": own.get(kind, {})} for kind, tree in variables.items()}


def init_state(
    networks: Networks,
    optimizer: optax.GradientTransformation,
    seed: int,
    teachers: Sequence[TeacherOutputs] = (),
) -> TrainState:
    """Return the state before the first step, as numpy arrays; for the arguments see `init_variables`."""
    variables = init_variables(networks, seed, teachers)
    shapes = jax.eval_shape(optimizer.init, trainable(networks, variables["params"]))
    # every optimizer starts with zeros everywhere: there is nothing to compute
    opt_state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = TrainState(np.zeros((), np.int32), **variables, opt_state=opt_state, copies={})
    return _with_copies(networks, state)


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """The weights of a trained network to start from.

    Attributes:
        source: where they are from, for messages.
        variables: of the network, as `Student` takes them.
        class_names: names of its classes, in the order of its logits.
    """

    source: str
    variables: Variables
    class_names: tuple[str, ...]


def start_from(
    state: TrainState, networks: Networks, given: InitialWeights, class_names: Sequence[str]
) -> TrainState:
    """Return the state with student 1, and the parts it shares, replaced by the weights of a trained network.

    In the classifier, classes are matched by name: a class that the given network does not know keeps its initial
    weights. A head that is not a linear classifier is taken over only if both networks have the same classes.

    Args:
        state: before the first step.
        networks: those of the state, and their method.
        given: the weights to start from.
        class_names: names of the classes of the run.

    Raises:
        UserError: they belong to another network.
    """
    ensemble, before = networks.ensemble, network_variables(state.variables)
    own, source = ensemble.student_variables(before, 1), f"model.initial_weights={given.source}"
    if flatten_dict(own).keys() != flatten_dict(given.variables).keys():
        raise UserError(f"{source} is another network: take a student with the same network name")
    same_classes = tuple(class_names) == given.class_names
    shared = [name for name in class_names if name in given.class_names]
    to = [list(class_names).index(name) for name in shared]
    of = [given.class_names.index(name) for name in shared]
    is_linear = "linear" in own["params"]["head"]

    def filled(path: Any, leaf: Any, theirs: Any) -> Any:
        names = [key.key for key in path][1:]
        in_head = names[:2] == ["head", "linear"] if is_linear else names[0] == "head"
        if in_head and not same_classes:
            if not is_linear:
                return leaf
            if theirs.shape[:-1] == leaf.shape[:-1]:
                new = leaf.copy()
                new[..., to] = theirs[..., of]
                return new
        elif theirs.shape == leaf.shape:
            return theirs
        raise UserError(
            f"{source}: {'/'.join(names)} has shape {theirs.shape}, this network {leaf.shape}: take a student "
            f"of the same network and width"
        )

    new = jax.tree_util.tree_map_with_path(filled, own, given.variables)
    if not same_classes:
        taken = len(shared) if is_linear else 0
        logger.info(
            f"{source}: the classifier starts from the weights of {taken} of the {len(class_names)} classes; "
            f"the others are initialized"
        )
    placed = ensemble.with_student_variables(before, 1, new)
    placed = {kind: {**tree, "method": state.variables[kind]["method"]} for kind, tree in placed.items()}
    return _with_copies(networks, dataclasses.replace(state, **placed))


def copied_variables(networks: Networks, variables: Variables) -> Variables:
    """Return the part of the variables that a copy holds: the networks, or everything that is averaged."""
    if not networks.ema_decay:
        return network_variables(variables)
    return {kind: variables[kind] for kind in ("params", "batch_stats")}


def moving_average(average: Any, new: Any, decay: float, step: Any) -> Any:
    """Return a moving average after a step.

        d average + (1 - d) new,    d = min(decay, (1 + t) / (10 + t))

    Args:
        average: a tree of arrays.
        new: the tree that is averaged.
        decay: largest weight of the old value.
        step: t, the number of steps taken, this one included.

    References:
        TensorFlow, tf.train.ExponentialMovingAverage with `num_updates`.
    """
    share = jnp.maximum(1 - decay, 9 / (10 + step))  # 1 - d
    # written so that what does not change, as frozen weights, keeps its bits
    return jax.tree.map(lambda old, x: old + share.astype(old.dtype) * (x - old), average, new)


def _with_copies(networks: Networks, state: TrainState) -> TrainState:
    """Return the state with every copy equal to what it is a copy of."""
    copied, numbers = copied_variables(networks, state.variables), range(1, networks.number_of_copies + 1)
    return dataclasses.replace(state, copies={str(i): jax.tree.map(np.copy, copied) for i in numbers})
