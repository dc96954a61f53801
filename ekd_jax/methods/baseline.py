"""Students that learn from the labels alone: the "Baseline" columns of the main method's paper."""

import jax

from ekd_jax.methods.base import Batch, Method, Terms, cross_entropy_terms
from ekd_jax.models.ensemble import Outputs


class Baseline(Method):
    """Training on the labels alone, with nothing shared and nothing exchanged.

        L = sum_i CE(z_i)

    With one student (`model.students=(0.2,)`) this is the paper's baseline. Several students are each
    trained as if alone, on the same batches; with `model.sharing=base` they share the base block.
    """

    sharing = "none"

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[jax.Array, Terms]:
        return cross_entropy_terms(outputs, batch)
