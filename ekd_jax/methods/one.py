"""ONE: knowledge distillation by an on-the-fly native ensemble.

Lan, Zhu, Gong, NeurIPS 2018 (arXiv 1806.04606); as in the official code, cifar_one.py,
models/cifar/resnet.py and loss/kl_loss.py (METHODS.md 2).
"""

import jax

from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Terms, check_choice, label_terms, per_student
from ekd_jax.methods.distilling import Ramped
from ekd_jax.methods.gate import Gate
from ekd_jax.models.ensemble import Outputs

Array = jax.Array


class One(Ramped):
    """L = sum_i CE_i + CE(z_e) + ramp * sum_i T^2 KL(sg z_e || i), with z_e = sum_i g_i z_i.

    Students are branches, the last stage and the classifier, on a shared base. The gate g gives weights to
    the branches, for every image, from the base's map. CE(z_e) trains gate, branches and base; the KD loss
    never moves its target. ONE is a single branch, ONE-E the ensemble, which is z_e.

    The official code adds 1e-7 to the target's probabilities so that none is 0; here both sides are
    log-softmaxes, and nothing need be added.

    Attributes:
        ensemble: "gated", or the "mean" of the branches (the paper's ablation).

    T is 3, R 80 epochs and the weight 1, as in the official code; the KD loss has the knobs of
    `Distilling`.
    """

    own_stages = 1

    ensemble: str = "gated"

    def __post_init__(self) -> None:
        check_choice(self, "ensemble", ("gated", "mean"))
        super().__post_init__()

    def setup(self) -> None:
        if self.ensemble == "gated":
            self.gate = Gate()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = label_terms(outputs, batch.labels)
        teacher_BxK = self._combine(outputs, train=True)
        terms["ensemble/loss_ce"] = losses.cross_entropy(teacher_BxK, batch.labels)
        kd_S = self.distil(outputs.logits_SxBxK, teacher_BxK, batch)
        terms |= per_student("loss_kd", kd_S)
        return ce + terms["ensemble/loss_ce"] + self.ramp(batch) * kd_S.sum(), terms

    def ensemble_logits(self, outputs: Outputs) -> Array:
        return self._combine(outputs, train=False)

    def _combine(self, outputs: Outputs, train: bool) -> Array:
        """z_e, (B, K)."""
        if self.ensemble == "mean":
            return outputs.logits_SxBxK.mean(0)
        return (self.gate(outputs, train)[..., None] * outputs.logits_SxBxK).sum(0)
