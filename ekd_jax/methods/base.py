"""What a method is: a Linen module called on the outputs of a batch.

A method does not know the training loop. It says how the loss is made and what predicts; whatever
else it trains (adaptation layers, gates) are its own parameters, which the train state holds under
`method/`. Its fields are its knobs, `config.method.*`.
"""

from typing import Any

import flax.linen as nn
import jax

from ekd_jax import losses
from ekd_jax.models.ensemble import Outputs

Array = jax.Array
Terms = dict[str, Array]


class Method(nn.Module):
    """A way to train S students together."""

    def __call__(self, outputs: Outputs, labels: Array) -> tuple[Array, Terms]:
        """The loss of one training batch.

        Args:
            outputs: of all students.
            labels: (B,) integers, or (B, K) shares of the classes.

        Returns:
            The scalar that is minimised, and the unweighted terms it is made of, scalars named
            `student_<i>/loss_<term>` or `ensemble/loss_<term>`, all of which are logged.
        """
        raise NotImplementedError

    def ensemble_logits(self, outputs: Outputs) -> Array:
        """Logits (B, K) of the ensemble in evaluation mode: the students' mean."""
        return outputs.logits_SxBxK.mean(0)

    @property
    def base_gradients(self) -> str:
        """Whose gradients reach the base block: "all" students' or the "pseudo_teacher"'s alone."""
        return "all"

    @property
    def learning_rate_scales(self) -> dict[str, float]:
        """Factors on the learning rate for the method's own parameters, by the name of the sub-tree."""
        return {}


def label_terms(outputs: Outputs, labels: Array) -> tuple[Array, Terms]:
    """Sum over students of their cross entropy (L_A), and each one's as a term."""
    ce_S = losses.cross_entropy(outputs.logits_SxBxK, labels)
    return ce_S.sum(), per_student("loss_ce", ce_S)


def per_student(term: str, values_S: Any) -> Terms:
    """`{"student_1/<term>": values[0], ...}`."""
    return {f"student_{i}/{term}": value for i, value in enumerate(values_S, 1)}
