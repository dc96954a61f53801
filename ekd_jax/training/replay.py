"""One step of a run taken once more, to see where something stops being finite; nothing is written."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.common.progress import Progress
from ekd_jax.data.dataset import Source
from ekd_jax.runs import workdir
from ekd_jax.runs.checkpoint import Checkpoints, saved_steps
from ekd_jax.runs.history import rewinds
from ekd_jax.runs.metrics import MetricWriter
from ekd_jax.runs.records import CONFIG
from ekd_jax.runs.state import network_variables, trainable
from ekd_jax.training.interrupt import Interrupt
from ekd_jax.training.loop import Loop, Record, open_loop
from ekd_jax.training.setup import prepare
from ekd_jax.training.single import first_state, resumed, slowed
from ekd_jax.training.step import make_draw, make_step
from ekd_jax.training.teaching import make_teach

EXAMPLES_SHOWN = 32
KINDS = (  # of arrays, in the order in which they are computed
    "state before the step",
    "images",
    "outputs of the teachers",
    "outputs of the networks",
    "terms of the loss",
    "gradients",
    "state after the step",
)


class _Captured(NamedTuple):
    """State of an optimizer that keeps the gradients it was given."""

    inner: Any
    gradients: Any


def replay(
    config: FrozenConfigDict,
    path: pathlib.Path,
    number: int,
    mesh: Mesh | None = None,
    source: Source | None = None,
) -> str:
    """Go from the last checkpoint before a step up to it, take it once more, and say what in it is not finite.

    Args:
        config: a complete configuration, that of the run.
        path: directory of the run.
        number: of the step, from 1.
        mesh: devices to train on; all if not given.
        source: the data set itself, if it is in memory.

    Returns:
        A line for each kind of arrays, in the order in which they are computed, and the examples of the batch.

    Raises:
        UserError: there is no such run or step, or something was not finite before that step.
    """
    if not (path / CONFIG).exists():
        raise UserError(f"--replay_step={number}: {path} holds no run; give its --workdir")
    workdir.check(path, config)
    setup = prepare(config, mesh or parallel.make_mesh(fsdp=config.train.fsdp), path, source)
    if number > setup.steps:
        raise UserError(f"--replay_step={number}: the run has {setup.steps:,} steps")
    first = first_state(setup, path)
    before = [step for step in saved_steps(path) if step < number]
    with contextlib.ExitStack() as stack:
        interrupt = Interrupt()
        stack.callback(interrupt.restore)
        checkpoints = Checkpoints(path, read_only=True)
        stack.callback(checkpoints.close)
        saved = checkpoints.restore(first, before[-1]) if before else None
        state, log = resumed(setup, first, saved)
        progress = Progress("replaying", number, int(state.step))
        stack.callback(progress.clear)
        record = Record(path, checkpoints, MetricWriter(None, 0, 0), progress, interrupt)
        loop = stack.enter_context(open_loop(slowed(setup, rewinds(path)), state, log, record))
        loop.advance_to(number - 1)
        arrays = _arrays_of_a_step(loop)
    begun = f"the checkpoint of step {before[-1]:,}" if before else "the start"
    return "\n".join([f"step {number:,} of {path}, replayed from {begun}", *_lines(arrays, loop)])


def _arrays_of_a_step(loop: Loop) -> dict[str, Any]:
    """Return all arrays of the next step: those of `KINDS`, `examples` and `targets`."""
    setup, networks = loop.setup, loop.setup.networks
    draw = make_draw(setup, loop.feed, make_teach(setup.teachers, setup.config.data))

    def update(gradients: Any, state: _Captured, params: Any = None) -> tuple[Any, _Captured]:
        updates, inner = setup.optimizer.update(gradients, state.inner, params)
        return updates, _Captured(inner, gradients)

    step = make_step(
        networks,
        optax.GradientTransformation(setup.optimizer.init, update),
        setup.steps,
        setup.config.train.epochs,
        setup.config.train.accumulation_steps,
        setup.mesh,
        setup.class_weights,
    )

    @jax.jit
    def arrays(state: Any, held: Any, frozen: Any) -> dict[str, Any]:
        drawn = draw(state.step, held, jnp.int32(0), frozen)
        method = networks.method
        outputs, _ = networks.ensemble.apply(
            network_variables(state.variables), drawn.images, train=method.trains_networks, key=drawn.key
        )
        zeros = jax.tree.map(jnp.zeros_like, trainable(networks, state.params))
        watched = dataclasses.replace(state, opt_state=_Captured(state.opt_state, zeros))
        new, metrics = step(watched, *drawn.arguments)
        return {
            "examples": drawn.examples,
            "targets": drawn.targets,
            "state before the step": vars(state),
            "images": drawn.images,
            "outputs of the teachers": [(given.logits, given.maps) for given in drawn.teachers],
            "outputs of the networks": {
                "base": outputs.base,
                "features": outputs.features,
                "logits": outputs.logits_SxBxK,
            },
            "terms of the loss": metrics,
            "gradients": new.opt_state.gradients,
            "state after the step": {**vars(new), "opt_state": new.opt_state.inner},
        }

    with jax.transfer_guard("allow"):
        found: dict[str, Any] = parallel.fetch(arrays(loop.state, loop.feed.load(loop.step), loop.frozen))
    return found


def _lines(arrays: dict[str, Any], loop: Loop) -> Iterator[str]:
    examples, targets = arrays["examples"], arrays["targets"]
    first = ""
    for kind in KINDS:
        leaves = [
            (jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf, np.float64))
            for path, leaf in jax.tree_util.tree_leaves_with_path(arrays[kind])
        ]
        leaves = [(path, leaf) for path, leaf in leaves if leaf.size]
        if not leaves:
            continue
        bad = [(path, leaf) for path, leaf in leaves if not np.isfinite(leaf).all()]
        if not bad:
            largest = max(np.abs(leaf).max() for _, leaf in leaves)
            yield f"{kind}: all finite, at most {largest:.3g} in size ({len(leaves)} arrays)"
            continue
        yield f"{kind}: {len(bad)} of {len(leaves)} arrays are not finite"
        path, leaf = bad[0]
        first = first or (
            f"the first that is not finite is {path or kind}, of the {kind}: "
            f"{int((~np.isfinite(leaf)).sum()):,} of {leaf.size:,} values"
        )
    yield first or "everything is finite"
    if KINDS[0] in first:
        yield f"it began earlier: --replay_step={loop.step} shows the step before"
    names = loop.setup.data.facts.class_names
    classes = targets.argmax(-1) if targets.ndim > 1 else targets
    shown = [f"{e} ({names[c]})" for e, c in zip(examples[:EXAMPLES_SHOWN], classes, strict=False)]
    more = f", and {len(examples) - EXAMPLES_SHOWN} more" if len(examples) > EXAMPLES_SHOWN else ""
    yield f"training images of the batch, with their classes: {', '.join(shown)}{more}"
