"""What is trained, and how it begins."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ekd_jax import models
from ekd_jax.config import make_method
from ekd_jax.methods.base import Method
from ekd_jax.models.ensemble import Ensemble, Outputs, Variables, parse_students
from ekd_jax.models.layers import initialise


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


def build(config: Any, num_classes: int) -> Ensemble:
    """The ensemble that `config` asks for."""
    return models.build(
        config.model.name,
        parse_students(config.model.students),
        config.model.no_blocks,
        num_classes,
        config.train.dtype,
        make_method(config).base_gradients,
    )


def forward_shapes(ensemble: Ensemble, variables: Variables, input_shape: tuple[int, ...]) -> Outputs:
    """Shapes of the outputs for one image of `input_shape` (H, W, C); computes nothing."""
    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    outputs: Outputs = jax.eval_shape(lambda v, x: ensemble.apply(v, x, train=False)[0], variables, images)
    return outputs


def init_variables(
    ensemble: Ensemble, method: Method, seed: int, input_shape: tuple[int, ...]
) -> Variables:
    """Initial variables of students and method, as numpy arrays."""
    variables = ensemble.init(seed, input_shape)
    outputs = forward_shapes(ensemble, variables, input_shape)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    own = initialise(method, seed, outputs, labels, name="method")
    return {kind: {**tree, "method": own.get(kind, {})} for kind, tree in variables.items()}


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
    # sgd and adam begin at zero everywhere: nothing to compute.
    opt_state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return TrainState(np.zeros((), np.int32), variables["params"], variables["batch_stats"], opt_state)
