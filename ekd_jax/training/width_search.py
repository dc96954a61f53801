"""Widths of a network's stages under a budget, from what the scales of its batch norms say."""

import pathlib
from fractions import Fraction

import numpy as np

from ekd_jax.common.errors import UserError
from ekd_jax.config.build import make_ensemble
from ekd_jax.config.resolve import resolve, to_dict
from ekd_jax.methods.blockwise import batch_norm_scales
from ekd_jax.models.cost import count, student_cost
from ekd_jax.runs.restore import restore


def widths_within(folder: pathlib.Path, budget: float, cost: str) -> tuple[float, ...]:
    """One width multiplier a stage for the network of a finished run of one student.

    Args:
        folder: of the run.
        budget: what the network may cost, as a share of the whole one's.
        cost: "macs" of one image, or "parameters".

    Returns:
        The widths of the largest network within the budget of those that are left when the smallest
        scales of all are taken away, one more at a time.

    Raises:
        UserError: not even one channel a stage is within the budget.
    """
    restored = restore(folder)
    network = restored.ensemble.alone(restored.variables, 1)["params"]
    stages = sorted(name for name in network if name.startswith("stage"))
    scales = [
        np.concatenate([np.abs(s).ravel() for s in batch_norm_scales(network[name])]) for name in stages
    ]
    order = np.sort(np.concatenate(scales))
    shape = tuple(restored.run.students["input_shape"])

    def widths(removed: int) -> tuple[float, ...]:
        left = [(s >= order[removed]).mean() for s in scales]
        # at least one channel of the sixteen that the narrowest stages have
        return tuple(float(Fraction(max(share, 1 / 16)).limit_denominator(256)) for share in left)

    def size(removed: int) -> int:
        config = to_dict(restored.run.config)
        config["model"]["students"] = (widths(removed),)
        ensemble = make_ensemble(resolve(config), restored.run.students["num_classes"])
        if cost == "macs":
            return student_cost(ensemble, 1, shape).macs
        return count(ensemble.init(None, shape)["params"])

    whole = size(0)
    fits, too_large = len(order) - 1, 0  # bisection between these numbers of scales taken away
    if size(fits) > budget * whole:
        raise UserError(
            f"method.budget={budget:g}: the narrowest network has {size(fits) / whole:.3f} of the whole "
            f"one's {cost}; ask for more"
        )
    while fits - too_large > 1:
        middle = (fits + too_large) // 2
        if size(middle) <= budget * whole:
            fits = middle
        else:
            too_large = middle
    return widths(fits)
