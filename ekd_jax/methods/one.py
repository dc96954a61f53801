"""Knowledge distillation by an on-the-fly native ensemble.

References:
    Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018, arXiv 1806.04606;
    official code Lan1991Xu/ONE_NeurIPS2018, cifar_one.py, models/cifar/resnet.py and loss/kl_loss.py
    (docs/reference/one.md).
"""

import jax

from ekd_jax.common.knob import one_of
from ekd_jax.methods.base import Batch, Terms, cross_entropy_terms, knob, per_student
from ekd_jax.methods.distilling import WithRampUp
from ekd_jax.methods.gate import Gate
from ekd_jax.models.ensemble import Outputs

Array = jax.Array


class ONE(WithRampUp):
    """On-the-fly native ensemble of gated branches (Lan, Zhu, Gong, NeurIPS 2018).

        L = sum_i CE(z_i) + CE(z_e) + ramp sum_i T^2 KL(sg z_e || z_i),    z_e = sum_i g_i z_i

    Students are branches, the last stage and the classifier, on a shared base block. The gate g weighs the
    branches, per image, from the base block's feature map. CE(z_e) trains gate, branches and base block;
    the KD loss does not move its target. The paper's ONE is one branch, its ONE-E the ensemble z_e. T = 3,
    R = 80 epochs and the weight 1 are the official code's.

    The official code adds 1e-7 to the target's probabilities so that none is 0; here both sides are
    log-softmaxes, and nothing is added.
    """

    own_stages = 1

    ensemble: str = knob(
        "gated",
        "How the branches are combined: by the gate, or by their mean (the paper's ablation).",
        one_of(("gated", "mean")),
    )

    def setup(self) -> None:
        if self.ensemble == "gated":
            self.gate = Gate()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        ce, terms = cross_entropy_terms(outputs, batch)
        teacher_BxK = self._combine(outputs, train=True)
        terms["ensemble/loss_ce"] = batch.cross_entropy(teacher_BxK)
        kd_S = self.distillation_loss(outputs.logits_SxBxK, teacher_BxK, batch)
        terms |= per_student("loss_kd", kd_S)
        return ce + terms["ensemble/loss_ce"] + self.ramp(batch) * kd_S.sum(), terms

    def ensemble_logits(self, outputs: Outputs) -> Array:
        return self._combine(outputs, train=False)

    def _combine(self, outputs: Outputs, train: bool) -> Array:
        """Return the ensemble's logits z_e, (B, K)."""
        if self.ensemble == "mean":
            return outputs.logits_SxBxK.mean(0)
        return (self.gate(outputs, train)[..., None] * outputs.logits_SxBxK).sum(0)
