"""Snapshot ensembles: several networks from the cycles of one run.

References:
    Huang, Li, Pleiss, Liu, Hopcroft, Weinberger, "Snapshot Ensembles: Train 1, Get M for Free", ICLR 2017,
    arXiv 1704.00109; official code gaohuang/SnapshotEnsemble, train.lua, main_snapshot_ensemble.lua and
    test_ensemble.lua (docs/reference/snapshot.md).
"""

import math

import jax
import jax.numpy as jnp
import optax

from ekd_jax.common.errors import UserError
from ekd_jax.common.knob import NOT_NEGATIVE, POSITIVE
from ekd_jax.methods.base import Batch, Copies, Method, Terms, cross_entropy_terms, knob
from ekd_jax.models.ensemble import Outputs, Variables

Array = jax.Array


class Snapshot(Method):
    """Snapshots of one network at the end of each learning rate cycle (Huang et al., ICLR 2017).

        rate(t) = learning_rate / 2 (1 + cos(pi t / n)),    step t = 1 ... n of a cycle

    There are M cycles; the network at the end of each of them is a student, and the ensemble is the mean of
    the students' probabilities. Momentum is kept at restarts. The loss is the cross entropy. With several
    networks each has snapshots of its own. Before a snapshot is taken, the latest network stands in for it.

    A cycle has floor(epochs / M) epochs, and the last cycle also the remainder. If M does not divide the
    epochs, this differs from the official code: here the last, longer cycle is one whole cosine. The code
    computes the position in the cycle as (epoch - 1) modulo the length of the current cycle, and so starts
    the longer last cycle in the middle of a cosine, restarts within it, and takes the last snapshot at a
    rate above 0 (of 10 epochs and M = 3: cycles of 3, 3 and 4 epochs, of which the last one runs through the
    second half of a cosine and then the first half of another).
    """

    sharing = "none"

    cycles: int = knob(5, "Number M of cycles and snapshots.", POSITIVE)
    last: int = knob(0, "How many snapshots the ensemble has, counted from the last; 0: all.", NOT_NEGATIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last > self.cycles:
            raise UserError(f"method.last={self.last} must be from 0 to method.cycles={self.cycles}")

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        return cross_entropy_terms(outputs, batch)

    def ensemble_logits(self, outputs: Outputs) -> Array:
        """Return the logarithms of the mean of the snapshots' probabilities, (B, K)."""
        last = outputs.logits_SxBxK[-self.last :] if self.last else outputs.logits_SxBxK
        return jax.nn.logsumexp(jax.nn.log_softmax(last), 0) - math.log(len(last))

    @property
    def number_of_copies(self) -> int:
        return self.cycles

    def update_copies(
        self, copies: Copies, networks: Variables, step: Array, steps: int, epochs: float
    ) -> Copies:
        """Return the copies after a step: each is the latest network until its cycle has ended."""
        ends = self._ends(steps, epochs)

        def follow(end: int, copy: Variables) -> Variables:
            followed: Variables = jax.tree.map(
                lambda new, old: jnp.where(step <= end, new, old), networks, copy
            )
            return followed

        return {name: follow(ends[int(name) - 1], copy) for name, copy in copies.items()}

    def learning_rate_schedule(self, learning_rate: float, steps: int, epochs: float) -> optax.Schedule:
        if epochs < self.cycles:
            raise UserError(
                f"method.cycles={self.cycles} needs at least {self.cycles} epochs, but "
                f"train.epochs={epochs:g}"
            )
        ends = jnp.asarray(self._ends(steps, epochs))
        begins = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])

        def rate(step: Array) -> Array:
            cycle = jnp.minimum(jnp.searchsorted(ends, step, side="right"), self.cycles - 1)
            done = (step + 1 - begins[cycle]) / (ends[cycle] - begins[cycle])
            return learning_rate / 2 * (1 + jnp.cos(jnp.pi * done))

        return rate

    def _ends(self, steps: int, epochs: float) -> list[int]:
        """Return the number of steps after which each cycle ends."""
        each = math.floor(epochs / self.cycles)
        return [round(each * (cycle + 1) * steps / epochs) for cycle in range(self.cycles - 1)] + [steps]
