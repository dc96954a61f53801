"""Ensemble and self-distillation: the protocol of Allen-Zhu & Li, "Towards Understanding Ensemble,
Knowledge Distillation and Self-Distillation in Deep Learning" (ICLR 2023, arXiv 2012.09816; METHODS.md 10).

The authors published no code. That N networks differ in their seed alone, that the ensemble is the mean of
their outputs and that a single network of the same kind learns from it is theirs; the KD loss's constants
(T = 4, weights .1 and .9) are a reconstruction.
"""

from ekd_jax.methods.base import EARLIER, check_above
from ekd_jax.methods.kd import FromTeachers


class EnsembleDistillation(FromTeachers):
    """N networks alone, seeds `seed` + 1, ..., `seed` + N; then one student, `seed`, from their mean.

    All stages train the network of student 1, for `train.epochs` each. The runs of the N networks are
    `earlier/member1` ... of the run's folder; their mean is the paper's "ensemble" (`ekd_jax.evaluate` of
    them gives the single networks).

    Attributes:
        members: N (paper: 10).
    """

    has_teachers = True

    members: int = 10

    def __post_init__(self) -> None:
        check_above(self, "members")
        super().__post_init__()

    @property
    def teacher_sources(self) -> tuple[str, ...]:
        return tuple(f"{EARLIER}/{name}" for name in member_names(self.members))


class SelfDistillation(EnsembleDistillation):
    """The same with one network: a student learns from another of its kind."""

    members: int = 1


def member_names(members: int) -> list[str]:
    """Return the names of the runs that train the members of the ensemble."""
    return [f"member{k}" for k in range(1, members + 1)]
