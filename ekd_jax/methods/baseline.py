"""Students trained by their labels alone (the paper's "Baseline" columns)."""

import jax

from ekd_jax.methods.base import Method, Terms, label_terms
from ekd_jax.models.ensemble import Outputs


class Baseline(Method):
    """Cross entropy, nothing exchanged.

    With one student (`model.students=(0.2,)`) this is the paper's baseline. With several, they
    share the base block and nothing else.
    """

    def __call__(self, outputs: Outputs, labels: jax.Array) -> tuple[jax.Array, Terms]:
        return label_terms(outputs, labels)
