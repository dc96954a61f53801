"""The metrics of a run, added up between two records, and what happens to a step that is not finite."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ekd_jax.common.knob import LARGEST
from ekd_jax.runs.state import TrainState

Array = jax.Array
Metrics = dict[str, Array]
Step = Callable[..., tuple[TrainState, Metrics]]
NEVER = LARGEST  # the step of what did not happen
UPDATE_NORM = "update_norm"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tally:
    """Sums of metrics since the last record.

    Attributes:
        sums: metric -> its sum over the steps that were taken, float32 scalar.
        broken: metric -> the first step in which it was not finite, int32 scalar; NEVER if there is none.
        skipped: number of steps that were not taken, int32 scalar.
    """

    sums: dict[str, Any]
    broken: dict[str, Any]
    skipped: Any

    def add(self, step: Array, metrics: Metrics, skips: bool) -> "Tally":
        """Return the tally with the metrics of one more step.

        Args:
            step: number of the step, from 1.
            metrics: of this step.
            skips: leave a step out that is not finite, as `skip_nonfinite` does.
        """
        broken = {
            name: jnp.where(jnp.isfinite(metrics[name]), first, jnp.minimum(first, step))
            for name, first in self.broken.items()
        }
        if not skips:
            return Tally(jax.tree.map(jnp.add, self.sums, metrics), broken, self.skipped)
        taken = all_finite(metrics)
        sums = {name: total + jnp.where(taken, metrics[name], 0) for name, total in self.sums.items()}
        return Tally(sums, broken, self.skipped + (1 - taken.astype(jnp.int32)))

    @property
    def first_broken(self) -> tuple[int, list[str]] | None:
        """The first step in which a metric was not finite, and the names of those; None if there is none."""
        first = min(int(step) for step in self.broken.values())
        return None if first == NEVER else (first, [n for n, step in self.broken.items() if step == first])

    @classmethod
    def of(cls, sums: dict[str, Any], skipped: int = 0) -> "Tally":
        """Return a tally in which nothing is broken, as numpy scalars."""
        sums = {name: np.float32(value) for name, value in sums.items()}
        return cls(sums, {name: np.int32(NEVER) for name in sums}, np.int32(skipped))


def skip_nonfinite(step: Step) -> Step:
    """Return a training step that keeps the old state where the new one, or a metric, would not be finite.

    The number of the step goes on, and so the next step draws another batch. The metrics have the norms of the
    changes besides, `<part>/update_norm` for every part of `parts_of`.

    Args:
        step: as `make_step` returns it.

    References:
        Micikevicius et al. 2018, "Mixed precision training", section 3.2, skips updates that overflow likewise.
    """

    def careful(state: TrainState, *given: Any) -> tuple[TrainState, Metrics]:
        new, metrics = step(state, *given)
        before, after = parts_of(state), parts_of(new)
        metrics = {
            **metrics,
            **{name_of_norm(part): _distance(after[part], before[part]) for part in after},
        }
        taken = all_finite(metrics)
        chosen = jax.tree.map(lambda theirs, own: jnp.where(taken, theirs, own), new, state)
        return dataclasses.replace(chosen, step=new.step), metrics

    return careful


def parts_of(state: TrainState) -> dict[str, Any]:
    """Return the arrays of a state by what they belong to; no part is empty.

    The parts are `base`, `student_1`, ..., `method`, each with its parameters and running statistics, and
    `optimizer` and `copies`.
    """
    parts: dict[str, Any] = {"optimizer": state.opt_state, "copies": state.copies}
    for kind, tree in (("params", state.params), ("batch_stats", state.batch_stats)):
        for name, part in tree.items():
            named = {f"student_{k}": own for k, own in part.items()} if name == "students" else {name: part}
            for key, own in named.items():
                parts.setdefault(key, {})[kind] = own
    return {name: part for name, part in parts.items() if jax.tree.leaves(part)}


def broken_parts(state: TrainState) -> list[str]:
    """Return the names of the parts of a state, as numpy arrays, in which something is not finite."""
    return [
        name
        for name, part in parts_of(state).items()
        if not all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(part))
    ]


def name_of_norm(part: str) -> str:
    """Return the name of the metric that is the norm of the change of a part."""
    return f"{part}/{UPDATE_NORM}"


def all_finite(metrics: Metrics) -> Array:
    """Return whether all metrics are finite, a boolean scalar."""
    return jnp.isfinite(jnp.stack([jnp.float32(value) for value in metrics.values()])).all()


def _distance(a: Any, b: Any) -> Array:
    """Return the Euclidean norm of a - b over all leaves, float32."""
    squares = jax.tree.map(lambda x, y: jnp.square(x.astype(jnp.float32) - y).sum(), a, b)
    return jnp.sqrt(sum(jax.tree.leaves(squares)))
