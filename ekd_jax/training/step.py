"""The training step: augmentation, networks, loss and update; many of them in one dispatch."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from ekd_jax.common import parallel
from ekd_jax.config.build import Networks
from ekd_jax.data.augment import Purpose, training_batch
from ekd_jax.data.feed import Feed
from ekd_jax.methods.base import Batch, Method, TeacherOutputs
from ekd_jax.models.ensemble import Outputs, Variables
from ekd_jax.runs.state import (
    TrainState,
    batch_shapes,
    copied_variables,
    merged,
    method_variables,
    moving_average,
    network_variables,
    trainable,
)
from ekd_jax.training.setup import Setup
from ekd_jax.training.tally import Metrics, Step, Tally, name_of_norm, parts_of, skip_nonfinite
from ekd_jax.training.teaching import Teach

Array = jax.Array
Gradients = Any


@jax.named_scope("loss")
def objective(
    method: Method, own: Variables, outputs: Outputs, batch: Batch
) -> tuple[Array, tuple[Metrics, Any]]:
    """Compute the loss of a batch, its metrics, and the new batch statistics of the method's layers.

    The metrics are `loss`, every term of the method, and the top-1 accuracy, in per cent, of everything that
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
    networks: Networks,
    optimizer: optax.GradientTransformation,
    steps: int = 1,
    epochs: float = 1.0,
    accumulation_steps: int = 1,
    mesh: Mesh | None = None,
    class_weights: np.ndarray | None = None,
) -> Step:
    """Make the function that updates the state from one batch.

    Args:
        networks: the students and the method that trains them.
        optimizer: as `make_optimizer` returns it.
        steps: of the whole run.
        epochs: of the whole run.
        accumulation_steps: the batch goes through the networks in this many parts. Part j holds examples j,
            j + accumulation_steps, j + 2 * accumulation_steps, ... Gradients and metrics are the parts' means.
            Batch norm's statistics, and losses that compare examples, are those of a part.
        mesh: devices that share the batch, if there are several.
        class_weights: (K,) weights of the classes in the cross entropy; None: all weigh 1.

    Returns:
        A function of (state, images (B, H, W, C) float32 normalized or a tuple of views of them, labels (B,)
        int32 or shares of classes (B, K), random key, outputs of the frozen teachers) that returns the next
        state and the metrics of the batch.
    """
    ensemble, method = networks.ensemble, networks.method

    def whole(tree: Any) -> Any:
        return tree if mesh is None else parallel.whole(mesh, tree)

    def step(
        state: TrainState,
        images: Any,
        labels: Array,
        key: Array | None = None,
        teachers: tuple[TeacherOutputs, ...] = (),
    ) -> tuple[TrainState, Metrics]:
        learned = trainable(networks, state.params)
        epoch = state.step * jnp.float32(epochs / steps)
        compared = whole(tuple(state.copies.values()) if method.uses_copy_outputs else ())

        def gradients_of(part: Part, stats: Any) -> tuple[Gradients, Metrics, Any]:
            """Return gradients, metrics and the new batch statistics."""
            copies = tuple(
                ensemble.apply(copy, part.images, train=True, key=part.key)[0] for copy in compared
            )
            weights = None if class_weights is None else jnp.asarray(class_weights)
            batch = Batch(part.labels, epoch, part.key, part.teachers, copies, class_weights=weights)

            def loss_of(learned: Any) -> tuple[Array, tuple[Metrics, Any]]:
                variables = {"params": whole(merged(state.params, learned)), "batch_stats": stats}
                trained = network_variables(variables)
                outputs, new = ensemble.apply(
                    trained, part.images, train=method.trains_networks, key=part.key
                )
                given = dataclasses.replace(batch, networks=trained["params"])
                loss, (metrics, own) = objective(method, method_variables(variables), outputs, given)
                return loss, (metrics, {**new, "method": own})

            (_, (metrics, new)), gradients = jax.value_and_grad(loss_of, has_aux=True)(learned)
            return gradients, metrics, new

        batch, stats = Part(images, labels, key, teachers), whole(state.batch_stats)
        if accumulation_steps == 1:
            gradients, metrics, stats = gradients_of(batch, stats)
        else:
            gradients, metrics, stats = in_parts(gradients_of, accumulation_steps, mesh, batch, stats)
        learners = method.learning_students(state.step, len(ensemble.students))
        if learners is not None:  # the norm of the gradients is that of the students that learn
            gradients = _choose(learners, gradients, jax.tree.map(jnp.zeros_like, gradients))
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, learned)
            params = merged(state.params, optax.apply_updates(learned, updates))
        new = TrainState(state.step + 1, params, stats, opt_state, state.copies)
        if learners is not None:  # momentum and statistics, too
            new = _choose(learners, new, state)
        if networks.number_of_copies:
            trained = copied_variables(networks, new.variables)
            if networks.ema_decay:
                copies = moving_average(state.copies, {"1": trained}, networks.ema_decay, new.step)
            else:
                copies = method.update_copies(state.copies, trained, new.step, steps, epochs)
            new = dataclasses.replace(new, copies=copies)
        return new, metrics

    return step


@dataclasses.dataclass(frozen=True)
class Part:
    """A batch, or the part of it that goes through the networks at once.

    Attributes:
        images: (B, H, W, C) float32 normalized, or a tuple of views of them.
        labels: (B,) int32, or shares of classes (B, K).
        key: of what is drawn.
        teachers: outputs of the frozen teachers.
    """

    images: Any
    labels: Array
    key: Array | None
    teachers: tuple[TeacherOutputs, ...]


def in_parts(
    gradients_of: Callable[[Part, Any], tuple[Gradients, Metrics, Any]],
    parts: int,
    mesh: Mesh | None,
    batch: Part,
    stats: Any,
) -> tuple[Gradients, Metrics, Any]:
    """Call `gradients_of` with one part of a batch after the other.

    Returns:
        The means of gradients and metrics, and the batch statistics after the last part.
    """

    def cut(leaf: Array) -> Array:
        """(B, ...) -> (parts, B / parts, ...); every device keeps its rows."""
        leaf = leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1)
        return leaf if mesh is None else lax.with_sharding_constraint(leaf, parallel.split(mesh, axis=1))

    said = [(teacher.logits, teacher.maps) for teacher in batch.teachers]
    numbers = jnp.arange(parts)
    batches = (numbers, *jax.tree.map(cut, (batch.images, batch.labels, said)))

    def one(stats: Any, rows: Any) -> tuple[Any, Metrics, Any]:
        number, images, labels, said = rows
        own_key = None if batch.key is None else jax.random.fold_in(batch.key, number)
        taught = tuple(
            dataclasses.replace(teacher, logits=logits, maps=maps)
            for teacher, (logits, maps) in zip(batch.teachers, said, strict=True)
        )
        return gradients_of(Part(images, labels, own_key, taught), stats)

    def body(carry: tuple[Any, Any], rows: Any) -> tuple[tuple[Any, Any], None]:
        sums, stats = carry
        gradients, metrics, stats = one(stats, rows)
        return (jax.tree.map(jnp.add, sums, (gradients, metrics)), stats), None

    first = jax.tree.map(lambda leaf: leaf[0], batches)
    shapes = jax.eval_shape(one, stats, first)[:2]
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    (sums, stats), _ = lax.scan(body, (zeros, stats), batches)
    gradients, metrics = jax.tree.map(lambda leaf: leaf / parts, sums)
    return gradients, metrics, stats


def _choose(learners: Array, theirs: Any, others: Any) -> Any:
    """Return a tree with the leaves of `theirs`; of `others` for the students that do not learn."""

    def choose(path: Any, own: Array, other: Array) -> Array:
        names = [str(getattr(key, "key", "")) for key in path]
        if "students" not in names:
            return own
        return jnp.where(learners[int(names[names.index("students") + 1]) - 1], own, other)

    return jax.tree_util.tree_map_with_path(choose, theirs, others)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Everything that is drawn for a step.

    Attributes:
        images: (B, H, W, C) float32 normalized, or a tuple of views of them.
        targets: labels (B,) int32, or shares of classes (B, K).
        key: of what the networks draw.
        teachers: outputs of the frozen teachers.
        examples: (B,) int32 numbers of the examples.
    """

    images: Any
    targets: Array
    key: Array
    teachers: tuple[TeacherOutputs, ...]
    examples: Array

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of a training step after the state."""
        return self.images, self.targets, self.key, self.teachers


def make_draw(setup: Setup, feed: Feed, teach: Teach) -> Callable[..., Drawn]:
    """Make the function that returns the augmented batch of a step, and what the teachers say to it.

    Args:
        setup: of the run.
        feed: where batches come from.
        teach: as `make_teach` returns it.

    Returns:
        A function of (number of steps taken before, what the feed holds, place of the batch in it, frozen inputs).
    """
    networks, data = setup.networks, setup.config.data
    classes, batch_size = setup.data.facts.num_classes, setup.config.train.batch_size
    repeats = data.sampler == "balanced"

    @jax.named_scope("draw")
    def draw(step: Array, held: Any, i: Array, frozen: Any) -> Drawn:
        key = jax.random.fold_in(jax.random.wrap_key_data(frozen["key"]), step)
        picked = feed.select_batch(held, i)
        images: Any
        # Copies of an example in a batch are augmented each in its own way.
        own_draws = jnp.arange(batch_size) if repeats else picked[2]
        drawn = (*picked[:2], own_draws, classes, data)
        images, targets = training_batch(key, *drawn)
        teachers = teach(frozen, images, picked[2])
        if networks.method.separate_views:
            students = range(1, len(networks.ensemble.students))
            keys = [jax.random.fold_in(key, Purpose.VIEW + s) for s in students]
            others = [training_batch(own, *drawn)[0] for own in keys]
            images = (images, *others)
        return Drawn(images, targets, jax.random.fold_in(key, Purpose.NETWORK), teachers, picked[2])

    return draw


def make_train_steps(setup: Setup, feed: Feed, teach: Teach, shardings: Any = None) -> Any:
    """Make the jitted function that takes many steps in one dispatch.

    Args:
        setup: of the run.
        feed: where batches come from.
        teach: as `make_teach` returns it.
        shardings: of the state, as `parallel.state_shardings` returns them; all replicated if not given.

    Returns:
        A function of (state, tally, held, number, frozen) that returns (state, tally, step) after `number` steps
        on the batches that the feed's `held` holds. State and tally are donated; `step` is there to wait for while
        the next dispatch already has the others. `frozen` holds the run's key, an argument so that all seeds share
        one program, and what `teach` needs. `number` is an argument of the compiled program, so that one program
        serves any number of steps and the result does not depend on how training is cut into dispatches.
    """
    config, mesh, skips = setup.config, setup.mesh, setup.skips_nonfinite
    step = make_step(
        setup.networks,
        setup.optimizer,
        setup.steps,
        config.train.epochs,
        config.train.accumulation_steps,
        mesh,
        setup.class_weights,
    )
    if skips:
        step = skip_nonfinite(step)
    draw = make_draw(setup, feed, teach)

    def train_steps(
        state: TrainState, tally: Tally, held: Any, number: Array, frozen: Any
    ) -> tuple[TrainState, Tally, Array]:
        def body(i: Array, carry: tuple[TrainState, Tally]) -> tuple[TrainState, Tally]:
            state, tally = carry
            state, metrics = step(state, *draw(state.step, held, i, frozen).arguments)
            with jax.named_scope("tally"):
                return state, tally.add(state.step, metrics, skips)

        state, tally = lax.fori_loop(0, number, body, (state, tally))
        return state, tally, state.step

    copied = parallel.replicated(mesh)
    return jax.jit(train_steps, donate_argnums=(0, 1), out_shardings=(shardings or copied, copied, copied))


def zero_tally(setup: Setup, state: TrainState) -> Tally:
    """Return the tally of no step, as numpy scalars; nothing is computed."""
    given = batch_shapes(setup.networks, setup.taught)
    own = method_variables(state.variables)
    names = list(jax.eval_shape(partial(objective, setup.networks.method), own, *given)[1][0])
    if setup.skips_nonfinite:
        names += map(name_of_norm, parts_of(state))
    return Tally.of(dict.fromkeys(names, 0.0))
