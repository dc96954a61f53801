"""Snapshot Ensembles: train 1, get M for free (Huang, Li, Pleiss, Liu, Hopcroft, Weinberger, ICLR 2017,
arXiv 1704.00109; official train.lua and test_ensemble.lua; METHODS.md 7)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ekd_jax.common.errors import UserError
from ekd_jax.methods.base import Batch, Method, Terms, check_above, label_terms
from ekd_jax.models.ensemble import Outputs

Array = jax.Array


class Snapshot(Method):
    """One network, M cycles of a cosine learning rate; the network at the end of each cycle is a student.

    A cycle has floor(epochs / M) epochs, the last one the remainder. In step t of n of a cycle the rate is
    alpha0 / 2 * (1 + cos(pi t / n)), t counted from 1; momentum goes on over restarts. Until a snapshot is
    taken the network as it is stands in for it. With more than one network each has its own snapshots.

    The students are the snapshots, in order, and the ensemble is the mean of the probabilities of the last
    `last` of them.

    Attributes:
        cycles: M.
        last: how many snapshots the ensemble has, from the last; 0: all.
    """

    sharing = "none"

    cycles: int = 5
    last: int = 0

    def __post_init__(self) -> None:
        check_above(self, "cycles")
        if not 0 <= self.last <= self.cycles:
            raise UserError(f"method.last={self.last} must be from 0 to method.cycles={self.cycles}")
        super().__post_init__()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        return label_terms(outputs, batch.labels)

    def ensemble_logits(self, outputs: Outputs) -> Array:
        """log of the mean of the softmaxes, (B, K)."""
        last = outputs.logits_SxBxK[-self.last :] if self.last else outputs.logits_SxBxK
        return jax.nn.logsumexp(jax.nn.log_softmax(last), 0) - math.log(len(last))

    @property
    def copies(self) -> int:
        return self.cycles

    def update_copies(self, copies: Any, networks: Any, step: Array, steps: int, epochs: float) -> Any:
        """Every copy follows the network until its cycle ends."""
        ends = self._ends(steps, epochs)

        def follow(end: int, copy: Any) -> Any:
            return jax.tree.map(lambda new, old: jnp.where(step <= end, new, old), networks, copy)

        return {name: follow(ends[int(name) - 1], copy) for name, copy in copies.items()}

    def learning_rate(self, config: Any, steps: int) -> optax.Schedule:
        if config.train.epochs < self.cycles:
            raise UserError(
                f"method.cycles={self.cycles}: train.epochs={config.train.epochs:g} must be at least as "
                f"many"
            )
        ends = jnp.asarray(self._ends(steps, config.train.epochs))
        begins = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])

        def rate(step: Array) -> Array:
            cycle = jnp.minimum(jnp.searchsorted(ends, step, side="right"), self.cycles - 1)
            done = (step + 1 - begins[cycle]) / (ends[cycle] - begins[cycle])
            return config.optimizer.learning_rate / 2 * (1 + jnp.cos(jnp.pi * done))

        return rate

    def _ends(self, steps: int, epochs: float) -> list[int]:
        """Steps after which cycles end."""
        each = math.floor(epochs / self.cycles)
        return [round(each * (cycle + 1) * steps / epochs) for cycle in range(self.cycles - 1)] + [steps]
