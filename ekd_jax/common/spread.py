"""A quantity over several runs: its mean and how far it spreads."""

import dataclasses
import statistics
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Spread:
    """A quantity over several runs that differ in their seed alone; `f"{found:.3f}"` is "1.234 ± 0.056".

    Attributes:
        values: one per run.
        mean: of these.
        std: their sample standard deviation; None for one run.
    """

    values: tuple[float, ...]
    mean: float
    std: float | None

    def __format__(self, spec: str) -> str:
        own = spec or ".2f"
        return f"{self.mean:{own}}" if self.std is None else f"{self.mean:{own}} ± {self.std:{own}}"

    def __str__(self) -> str:
        return format(self)


def spread(values: Iterable[float]) -> Spread:
    """Return mean and sample standard deviation of at least one value."""
    each = tuple(values)
    return Spread(each, statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else None)
