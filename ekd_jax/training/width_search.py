"""The widths of a network's stages under a budget, chosen by the scales of its batch norms."""

import pathlib
from fractions import Fraction

import numpy as np

from ekd_jax.common.errors import UserError
from ekd_jax.config.build import build_networks
from ekd_jax.config.resolve import resolve, to_dict
from ekd_jax.methods.blockwise import batch_norm_scales
from ekd_jax.models.cost import count_parameters
from ekd_jax.runs.run import load_run
from ekd_jax.runs.state import deployed_variables


def widths_within(directory: pathlib.Path, budget: float, cost: str) -> tuple[float, ...]:
    """Return one width multiplier per stage for the network of a complete run of one student.

    The channels with the smallest batch norm scales are removed, one more at a time, until the network is within
    the budget; a stage keeps the share of its channels that is left.

    Args:
        directory: of the run.
        budget: what the network may cost, as a share of the whole network's cost.
        cost: "macs" of one image, or "parameters".

    Raises:
        UserError: not even one channel per stage is within the budget.
    """
    run = load_run(directory)
    (learned, *_) = deployed_variables(run.checkpoint.variables)
    network = run.networks.ensemble.student_variables(learned, 1)["params"]
    stages = sorted(name for name in network if name.startswith("stage"))
    scales = [
        np.concatenate([np.abs(s).ravel() for s in batch_norm_scales(network[name])]) for name in stages
    ]
    order = np.sort(np.concatenate(scales))

    def widths(removed: int) -> tuple[float, ...]:
        left = [(s >= order[removed]).mean() for s in scales]
        # at least one of the sixteen channels that the narrowest stages have
        return tuple(float(Fraction(max(share, 1 / 16)).limit_denominator(256)) for share in left)

    def size(removed: int) -> int:
        config = to_dict(run.config)
        config["model"]["students"] = (widths(removed),)
        own = run.description
        trace = build_networks(resolve(config), own.num_classes, own.input_shape).trace
        return trace.cost(1).macs if cost == "macs" else count_parameters(trace.init(None)["params"])

    whole = size(0)
    fits, too_large = len(order) - 1, 0  # bisection between these numbers of removed scales
    if size(fits) > budget * whole:
        raise UserError(
            f"method.budget={budget:g}: the narrowest network has {size(fits) / whole:.3f} of the whole "
            f"network's {cost}; ask for more"
        )
    while fits - too_large > 1:
        middle = (fits + too_large) // 2
        if size(middle) <= budget * whole:
            fits = middle
        else:
            too_large = middle
    return widths(fits)
