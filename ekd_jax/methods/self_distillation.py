"""Ensemble distillation and self-distillation, by the protocol of Allen-Zhu and Li.

References:
    Allen-Zhu, Li, "Towards Understanding Ensemble, Knowledge Distillation and Self-Distillation in Deep
    Learning", ICLR 2023, arXiv 2012.09816 (docs/reference/self_distillation.md). The authors published no code.
    Theirs are that the N networks differ in their seed alone, that the ensemble is the mean of their outputs,
    and that one network of the same kind learns from it; the constants of the KD loss (T = 4, weights .1 and
    .9) are a reconstruction.
"""

from ekd_jax.common.knob import POSITIVE
from ekd_jax.methods.base import EARLIER, knob
from ekd_jax.methods.kd import Hinton


class EnsembleDistillation(Hinton):
    """Distillation of an ensemble of equal networks into one of them (Allen-Zhu, Li, ICLR 2023).

    N networks are trained alone, with the seeds `seed` + 1 to `seed` + N; then one student, with `seed`,
    learns from their mean by the loss of `Hinton`. All runs train the network of student 1 for
    `train.epochs`. Those of the N networks are in `earlier/member1`, ... of the run's directory;
    `ekd_jax.evaluate` of them gives the single networks. The paper has N = 10.
    """

    has_teachers = True

    members: int = knob(10, "Number N of networks in the ensemble.", POSITIVE)

    @property
    def teacher_sources(self) -> tuple[str, ...]:
        return tuple(f"{EARLIER}/{name}" for name in member_names(self.members))


class SelfDistillation(EnsembleDistillation):
    """Distillation of one network into another of its kind (Allen-Zhu, Li, ICLR 2023).

    It is `EnsembleDistillation` with an ensemble of one.
    """

    members: int = 1


def member_names(members: int) -> list[str]:
    """Return the names of the runs that train the members of the ensemble."""
    return [f"member{k}" for k in range(1, members + 1)]
