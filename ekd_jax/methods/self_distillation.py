"""Ensemble and self-distillation: the protocol of Allen-Zhu & Li, "Towards Understanding Ensemble,
Knowledge Distillation and Self-Distillation in Deep Learning" (ICLR 2023, arXiv 2012.09816; METHODS.md 10).

The authors published no code. That N networks differ in their seed alone, that the ensemble is the mean of
their outputs and that a single network of the same kind learns from it is theirs; the KD loss's constants
(T = 4, weights .1 and .9) are a reconstruction.
"""

import pathlib
from typing import Any

from ekd_jax.methods.base import Stages, check_above
from ekd_jax.methods.kd import FromTeachers


class EnsembleDistillation(FromTeachers):
    """N networks alone, seeds `seed` + 1, ..., `seed` + N; then one student, `seed`, from their mean.

    All stages train the network of student 1, for `train.epochs` each. The runs of the N networks are
    `stages/member1` ... of the run's folder; their mean is the paper's "ensemble" (`ekd_jax.evaluate` of
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
        return tuple(f"stages/{name}" for name in self._names(self.members))

    @classmethod
    def stages(cls, config: Any, workdir: pathlib.Path) -> Stages:
        names = cls._names(config.method.members)
        return {name: alone(config, seed=config.seed + k) for k, name in enumerate(names, 1)}

    @staticmethod
    def _names(members: int) -> list[str]:
        return [f"member{k}" for k in range(1, members + 1)]


class SelfDistillation(EnsembleDistillation):
    """The same with one network: a student learns from another of its kind."""

    members: int = 1


def alone(config: Any, seed: int) -> Any:
    """The configuration of student 1's network trained by itself."""
    asked = config.model.students
    stage = config.to_dict()
    stage["seed"] = seed
    stage["method"] = {"name": "baseline"}
    stage["model"]["students"] = (asked[0],) if isinstance(asked, tuple) else (1,)
    stage["model"]["sharing"] = ""
    return stage
