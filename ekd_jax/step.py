"""The training step: augment, base, branches, loss, update; many of them in one dispatch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from ekd_jax import parallel
from ekd_jax.data.augment import Purpose, training_batch
from ekd_jax.data.feed import Feed
from ekd_jax.methods.base import Method, per_student
from ekd_jax.models.ensemble import Ensemble, Outputs, Variables
from ekd_jax.state import TrainState

Array = jax.Array
Metrics = dict[str, Array]


def objective(
    method: Method, own: Variables, outputs: Outputs, labels: Array
) -> tuple[Array, tuple[Metrics, Any]]:
    """The loss of a batch, its metrics, and the method's new batch statistics.

    The metrics are `loss`, every term of the method, and each student's and the ensemble's top-1
    accuracy in per cent.
    """
    (loss, terms), updated = method.apply(own, outputs, labels, mutable=["batch_stats"])
    ensemble_BxK: Any = method.apply({**own, **updated}, outputs, method="ensemble_logits")
    if labels.ndim > 1:
        labels = labels.argmax(-1)  # of mixed images the one with the greater share
    top1_S = 100 * (outputs.logits_SxBxK.argmax(-1) == labels).mean(-1)
    metrics = {
        "loss": loss,
        **terms,
        **per_student("top1", top1_S),
        "ensemble/top1": 100 * (ensemble_BxK.argmax(-1) == labels).mean(),
    }
    return loss, (metrics, updated.get("batch_stats", {}))


def make_step(
    ensemble: Ensemble, method: Method, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One update from one batch.

    Returns:
        A function of (state, images (B, H, W, C) float32 normalised, labels (B,) int32 or shares (B, K),
        key of what the network drops, if anything) that gives the next state and the batch's metrics.
    """

    def step(
        state: TrainState, images: Array, labels: Array, key: Array | None = None
    ) -> tuple[TrainState, Metrics]:
        def loss_of(params: Any) -> tuple[Array, tuple[Metrics, Any]]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            outputs, stats = ensemble.apply(variables, images, train=True, key=key)
            own = {kind: tree["method"] for kind, tree in variables.items()}
            loss, (metrics, stats["method"]) = objective(method, own, outputs, labels)
            return loss, (metrics, stats)

        (_, (metrics, stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, stats, opt_state), metrics

    return step


def make_train_steps(
    config: Any,
    ensemble: Ensemble,
    method: Method,
    optimizer: optax.GradientTransformation,
    feed: Feed,
    num_classes: int,
    mesh: Mesh,
) -> Any:
    """Many steps in one dispatch, as one jitted function.

    Args:
        feed: where batches come from.
        num_classes: K.

    Returns:
        A jitted function of (state, sums, held, number) that gives (state, sums) after `number` steps
        on the batches that the feed's `held` holds. `sums` are the metrics added up since they were
        last zero. State and sums are donated. `number` is an argument of the compiled program, so
        that one program serves any number of steps and the result does not depend on how training is
        cut into dispatches.
    """
    step = make_step(ensemble, method, optimizer)
    run_key = jax.random.key(config.seed)

    def train_steps(
        state: TrainState, sums: Metrics, held: Any, number: Array
    ) -> tuple[TrainState, Metrics]:
        def body(i: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, sums = carry
            key = jax.random.fold_in(run_key, state.step)
            images, targets = training_batch(key, *feed.pick(held, i), num_classes, config.data)
            state, metrics = step(state, images, targets, jax.random.fold_in(key, Purpose.NETWORK))
            return state, jax.tree.map(jnp.add, sums, metrics)

        return lax.fori_loop(0, number, body, (state, sums))

    copied = parallel.replicated(mesh)
    return jax.jit(train_steps, donate_argnums=(0, 1), out_shardings=(copied, copied))


def zero_metrics(
    ensemble: Ensemble, method: Method, state: TrainState, input_shape: tuple[int, ...]
) -> Any:
    """The metrics of a step, all zero, as numpy scalars; computes nothing."""
    outputs = ensemble.shapes(input_shape)
    own = {kind: tree["method"] for kind, tree in state.variables.items()}
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes = jax.eval_shape(partial(objective, method), own, outputs, labels)[1][0]
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
