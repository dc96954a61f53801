"""The cost of a network: parameters, multiply-accumulates and activation memory, read from its jaxpr."""

import math
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxprs_in_params

OWN_CONVOLUTIONS = ("grouped_convolution", "fitted_convolution")  # jitted functions of convolution.py


class Cost(NamedTuple):
    """The cost of one image.

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products.
        activations: number of values that convolutions and matrix products return.
        kept: number of values kept for the backward pass, estimated as inputs and outputs of convolutions
            and matrix products. Of rematerialized blocks only the output counts.
        recomputed: the most values kept at a time while a rematerialized block is recomputed.
    """

    macs: int = 0
    activations: int = 0
    kept: int = 0
    recomputed: int = 0

    def __add__(self, other: tuple[Any, ...]) -> "Cost":
        macs, activations, kept, recomputed = other
        sums = self.macs + macs, self.activations + activations, self.kept + kept
        return Cost(*sums, max(self.recomputed, recomputed))

    def times(self, number: int) -> "Cost":
        """Return the cost of running this several times, one after the other."""
        return Cost(number * self.macs, number * self.activations, number * self.kept, self.recomputed)


def count_parameters(tree: Any) -> int:
    """Return how many numbers a tree of arrays or shapes holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_cost(jaxpr: Any) -> Cost:
    """Return the cost of a jaxpr, loops included."""
    total = Cost()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        output: Any = eqn.outvars[0].aval if eqn.outvars else None
        own_convolution = eqn.params.get("name") in OWN_CONVOLUTIONS and len(eqn.invars) == 2
        if name == "conv_general_dilated" or own_convolution:
            kernel = eqn.invars[1].aval.shape
            dimensions = eqn.params.get("dimension_numbers")
            features = kernel[dimensions.rhs_spec[0] if dimensions else -1]
            total += _product_cost(eqn, output.size * math.prod(kernel) // features)
        elif name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += _product_cost(eqn, output.size * math.prod(shape[axis] for axis in contracted))
        else:
            inner = sum(map(count_cost, jaxprs_in_params(eqn.params)), Cost())
            if name in ("remat2", "checkpoint"):  # its name in older and newer JAX
                inner = inner._replace(kept=output.size, recomputed=inner.kept)
            total += inner.times(eqn.params["length"] if name == "scan" else 1)
    return total


def _product_cost(eqn: Any, macs: int) -> Cost:
    output, read = eqn.outvars[0].aval.size, eqn.invars[0].aval.size
    return Cost(macs, output, output + read)
