"""Students trained by their labels alone (the paper's "Baseline" columns)."""

import jax

from ekd_jax.methods.base import Batch, Method, Terms, label_terms
from ekd_jax.models.ensemble import Outputs


class Baseline(Method):
    """Cross entropy, nothing shared and nothing exchanged.

    With one student (`model.students=(0.2,)`) this is the paper's baseline; with several, each is trained
    as if it were alone, on the same batches. With `model.sharing=base` they share the base block.
    """

    sharing = "none"

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[jax.Array, Terms]:
        return label_terms(outputs, batch.labels)
