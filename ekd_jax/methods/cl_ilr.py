"""CL-ILR: collaborative learning with intermediate-level representation sharing.

Song, Chai, NeurIPS 2018 (arXiv 1805.11761); as in winycg/MCL-OKD, main_cifar_cl_ilr.py and
models/cl_ilr_resnet.py (METHODS.md 12.2).
"""

import jax

from ekd_jax.common.errors import UserError
from ekd_jax.methods.base import Batch, Terms, label_terms, per_student
from ekd_jax.methods.distilling import Distilling, mean_of, of_peers
from ekd_jax.models.ensemble import Outputs

Array = jax.Array


class ClIlr(Distilling):
    """L = sum_h beta * CE_h + (1 - beta) * T^2 KL(sg mean_{j != h} z_j || h).

    Students are the heads of a binary tree: a shared base, then two of the next stage, four of the one
    after that. Where ways part, the gradient that comes back is divided by their number. The paper has four
    heads.

    Attributes:
        beta: weight of the cross entropy, the rest is the KD loss's.

    The KD loss has the knobs of `Distilling`; T is 2.
    """

    sharing = "tree"

    temperature: float = 2.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise UserError(f"method.beta={self.beta:g} must be from 0 to 1")
        super().__post_init__()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = label_terms(outputs, batch.labels)
        kd_S = of_peers(
            lambda own, others: self.distil(own, mean_of(others, self.temperature, "logits"), batch),
            outputs.logits_SxBxK,
            outputs.logits_SxBxK,
        )
        terms |= per_student("loss_kd", kd_S)
        return self.beta * ce + (1 - self.beta) * kd_S.sum(), terms

    @property
    def base_gradients(self) -> str:
        return "mean"
