"""What methods have in common whose KD loss gains weight over the first epochs."""

import jax

from ekd_jax.methods.base import Batch, check_not_negative, ramp_up
from ekd_jax.methods.distilling import Distilling


class Ramped(Distilling):
    """A method that multiplies its KD losses by kd_weight * exp(-5 (1 - min(epoch, R) / R)^2).

    Attributes:
        rampup_epochs: R; 0: the full weight from the start.
        kd_weight: that weight.
    """

    temperature: float = 3.0
    rampup_epochs: float = 80.0
    kd_weight: float = 1.0

    def __post_init__(self) -> None:
        check_not_negative(self, "rampup_epochs", "kd_weight")
        super().__post_init__()

    def ramp(self, batch: Batch) -> jax.Array:
        """The weight of the KD losses in this step, a scalar."""
        return self.kd_weight * ramp_up(batch.epoch, self.rampup_epochs)
