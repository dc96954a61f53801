"""The training step: augment, base, branches, loss, update; many of them in one dispatch."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from ekd_jax.common import parallel
from ekd_jax.data.augment import Purpose, training_batch
from ekd_jax.data.feed import Feed
from ekd_jax.methods.base import Batch, Method, TeacherOutputs
from ekd_jax.models.ensemble import Ensemble, Outputs, Variables
from ekd_jax.runs.state import TrainState, batch_shapes, of_method, of_networks, trainable

Array = jax.Array
Metrics = dict[str, Array]
Teach = Callable[[Any, Array, Array], tuple[TeacherOutputs, ...]]


def objective(
    method: Method, own: Variables, outputs: Outputs, batch: Batch
) -> tuple[Array, tuple[Metrics, Any]]:
    """The loss of a batch, its metrics, and the method's new batch statistics.

    The metrics are `loss`, every term of the method, and the top-1 accuracy in per cent of everything that
    predicts.
    """
    (loss, terms), updated = method.apply(own, outputs, batch, mutable=["batch_stats"])
    predictions: Any = method.apply({**own, **updated}, outputs, method="predictions")
    top1 = {
        f"{name}/top1": 100 * (logits.argmax(-1) == batch.classes).mean()
        for name, logits in zip(method.prediction_names(outputs), predictions, strict=True)
    }
    return loss, ({"loss": loss, **terms, **top1}, updated.get("batch_stats", {}))


def make_step(
    ensemble: Ensemble,
    method: Method,
    optimizer: optax.GradientTransformation,
    steps: int = 1,
    epochs: float = 1.0,
    accumulate: int = 1,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One update from one batch.

    Args:
        ensemble: the networks.
        method: how they learn.
        optimizer: as `make_optimizer` gives it.
        steps, epochs: of the whole run.
        accumulate: the batch goes through the networks in so many parts, every part's example number
            i * accumulate + j being part j's number i; gradients and metrics are the parts' means. Batch
            norm's statistics, and losses that compare examples, are those of a part.
        mesh: devices that share the batch, if there are several.

    Returns:
        A function of (state, images (B, H, W, C) float32 normalized or a tuple of views of them, labels
        (B,) int32 or shares (B, K), key of what network and method draw, if anything, outputs of the
        frozen teachers) that gives the next state and the batch's metrics.
    """

    def step(
        state: TrainState,
        images: Any,
        labels: Array,
        key: Array | None = None,
        teachers: tuple[TeacherOutputs, ...] = (),
    ) -> tuple[TrainState, Metrics]:
        learned = trainable(method, state.params)
        epoch = state.step * jnp.float32(epochs / steps)
        compared = whole(tuple(state.copies.values()) if method.uses_copy_outputs else ())

        def gradients_of(
            stats: Any, images: Any, labels: Array, key: Array | None, teachers: tuple[TeacherOutputs, ...]
        ) -> tuple[Any, Metrics, Any]:
            """Gradients, metrics and the new batch statistics."""
            copies = tuple(ensemble.apply(copy, images, train=True, key=key)[0] for copy in compared)
            batch = Batch(labels, epoch, key, teachers, copies)

            def loss_of(learned: Any) -> tuple[Array, tuple[Metrics, Any]]:
                variables = {"params": whole({**state.params, **learned}), "batch_stats": stats}
                networks = of_networks(variables)
                outputs, new = ensemble.apply(networks, images, train=method.trains_networks, key=key)
                given = dataclasses.replace(batch, networks=networks["params"])
                loss, (metrics, own) = objective(method, of_method(variables), outputs, given)
                return loss, (metrics, {**new, "method": own})

            (_, (metrics, new)), gradients = jax.value_and_grad(loss_of, has_aux=True)(learned)
            return gradients, metrics, new

        stats = whole(state.batch_stats)
        if accumulate == 1:
            gradients, metrics, stats = gradients_of(stats, images, labels, key, teachers)
        else:
            gradients, metrics, stats = in_parts(
                gradients_of, accumulate, mesh, stats, images, labels, key, teachers
            )
        updates, opt_state = optimizer.update(gradients, state.opt_state, learned)
        params = {**state.params, **optax.apply_updates(learned, updates)}
        new = TrainState(state.step + 1, params, stats, opt_state, state.copies)
        learners = method.learning_students(state.step, len(ensemble.students))
        if learners is not None:
            new = _only(learners, new, state)
        if method.number_of_copies:
            networks = of_networks(new.variables)
            copies = method.update_copies(state.copies, networks, new.step, steps, epochs)
            new = dataclasses.replace(new, copies=copies)
        return new, metrics

    def whole(tree: Any) -> Any:
        return tree if mesh is None else parallel.whole(mesh, tree)

    return step


def in_parts(
    gradients_of: Callable[..., tuple[Any, Metrics, Any]],
    parts: int,
    mesh: Mesh | None,
    stats: Any,
    images: Any,
    labels: Array,
    key: Array | None,
    teachers: Sequence[TeacherOutputs],
) -> tuple[Any, Metrics, Any]:
    """As `gradients_of` one batch, which goes through it part by part: means of gradients and metrics, and
    the batch statistics after the last part."""

    def cut(leaf: Array) -> Array:
        """(B, ...) -> (parts, B / parts, ...); every device keeps its rows."""
        leaf = leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1)
        return leaf if mesh is None else lax.with_sharding_constraint(leaf, parallel.split(mesh, axis=1))

    said = [(teacher.logits, teacher.maps) for teacher in teachers]
    numbers = jnp.arange(parts)
    batches = (numbers, *jax.tree.map(cut, (images, labels, said)))

    def one(stats: Any, batch: Any) -> tuple[Any, Metrics, Any]:
        number, images, labels, said = batch
        own_key = None if key is None else jax.random.fold_in(key, number)
        taught = tuple(
            dataclasses.replace(teacher, logits=logits, maps=maps)
            for teacher, (logits, maps) in zip(teachers, said, strict=True)
        )
        return gradients_of(stats, images, labels, own_key, taught)

    def body(carry: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], None]:
        sums, stats = carry
        gradients, metrics, stats = one(stats, batch)
        return (jax.tree.map(jnp.add, sums, (gradients, metrics)), stats), None

    first = jax.tree.map(lambda leaf: leaf[0], batches)
    shapes = jax.eval_shape(one, stats, first)[:2]
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    (sums, stats), _ = lax.scan(body, (zeros, stats), batches)
    gradients, metrics = jax.tree.map(lambda leaf: leaf / parts, sums)
    return gradients, metrics, stats


def _only(learners: Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state with the students who do not learn as they were, momentum and statistics included."""

    def choose(path: Any, after: Array, before: Array) -> Array:
        names = [str(getattr(key, "key", "")) for key in path]
        if "students" not in names:
            return after
        return jnp.where(learners[int(names[names.index("students") + 1]) - 1], after, before)

    return jax.tree_util.tree_map_with_path(choose, new, old)


def make_train_steps(
    config: Any,
    ensemble: Ensemble,
    method: Method,
    optimizer: optax.GradientTransformation,
    feed: Feed,
    num_classes: int,
    mesh: Mesh,
    steps: int,
    teach: Teach = lambda frozen, images, examples: (),
    shardings: Any = None,
) -> Any:
    """Many steps in one dispatch, as one jitted function.

    Args:
        feed: where batches come from.
        num_classes: K.
        mesh: devices that share a batch.
        steps: of the whole run.
        teach: (what is frozen, images, numbers of the examples) -> outputs of the teachers.
        shardings: of the state, as `parallel.state_shardings` gives them; all whole if not given.

    Returns:
        A jitted function of (state, sums, held, number, frozen) that gives (state, sums, step) after
        `number` steps on the batches that the feed's `held` holds. `step` is for waiting, while the next
        dispatch already has the others. `frozen` is the run's key, an argument so that
        all seeds share one program, and what `teach` needs of the teachers. `sums` are the metrics added
        up since they were last zero. State and sums are donated. `number` is an argument of the compiled
        program, so that one program serves any number of steps and the result does not depend on how
        training is cut into dispatches.
    """
    step = make_step(
        ensemble, method, optimizer, steps, config.train.epochs, config.train.accumulation_steps, mesh
    )

    def train_steps(
        state: TrainState, sums: Metrics, held: Any, number: Array, frozen: Any
    ) -> tuple[TrainState, Metrics, Array]:
        def body(i: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, sums = carry
            key = jax.random.fold_in(jax.random.wrap_key_data(frozen["key"]), state.step)
            picked = feed.pick(held, i)
            images: Any
            images, targets = training_batch(key, *picked, num_classes, config.data)
            teachers = teach(frozen, images, picked[2])
            if method.separate_views:
                keys = [jax.random.fold_in(key, Purpose.VIEW + s) for s in range(1, len(ensemble.students))]
                others = [training_batch(own, *picked, num_classes, config.data)[0] for own in keys]
                images = (images, *others)
            own_key = jax.random.fold_in(key, Purpose.NETWORK)
            state, metrics = step(state, images, targets, own_key, teachers)
            return state, jax.tree.map(jnp.add, sums, metrics)

        state, sums = lax.fori_loop(0, number, body, (state, sums))
        return state, sums, state.step

    copied = parallel.replicated(mesh)
    return jax.jit(train_steps, donate_argnums=(0, 1), out_shardings=(shardings or copied, copied, copied))


def zero_metrics(
    ensemble: Ensemble,
    method: Method,
    state: TrainState,
    input_shape: Sequence[int],
    teachers: Sequence[TeacherOutputs] = (),
) -> Any:
    """The metrics of a step, all zero, as numpy scalars; computes nothing."""
    given = batch_shapes(ensemble, method, input_shape, teachers)
    shapes = jax.eval_shape(partial(objective, method), of_method(state.variables), *given)[1][0]
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
