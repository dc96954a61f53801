"""What a network costs: parameters, multiply-accumulates and activation memory, read from its jaxpr."""

import math
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxprs_in_params

OWN_CONVOLUTIONS = ("grouped_convolution", "fitted_convolution")  # functions of convolution.py


class Cost(NamedTuple):
    """Of one image.

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products.
        activations: how many numbers they give.
        kept: how many numbers the backward pass keeps, taken to be what they get and give; of what is
            computed again (`train.rematerialize`) the outcome.
        again: of all that is computed again at once, the most that is kept meanwhile.
    """

    macs: int = 0
    activations: int = 0
    kept: int = 0
    again: int = 0

    def __add__(self, other: tuple[Any, ...]) -> "Cost":
        macs, activations, kept, again = other
        more = self.macs + macs, self.activations + activations, self.kept + kept
        return Cost(*more, max(self.again, again))

    def times(self, number: int) -> "Cost":
        return Cost(number * self.macs, number * self.activations, number * self.kept, self.again)


def count_parameters(tree: Any) -> int:
    """Return how many numbers a tree of arrays or shapes holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_cost(jaxpr: Any) -> Cost:
    """The cost of a jaxpr, loops included."""
    total = Cost()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        given: Any = eqn.outvars[0].aval if eqn.outvars else None
        own = eqn.params.get("name") in OWN_CONVOLUTIONS and len(eqn.invars) == 2
        if name == "conv_general_dilated" or own:
            kernel = eqn.invars[1].aval.shape
            numbers = eqn.params.get("dimension_numbers")
            outputs = kernel[numbers.rhs_spec[0] if numbers else -1]
            total += _of_product(eqn, given.size * math.prod(kernel) // outputs)
        elif name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += _of_product(eqn, given.size * math.prod(shape[axis] for axis in contracted))
        else:
            times = eqn.params["length"] if name == "scan" else 1
            inner = sum(map(count_cost, jaxprs_in_params(eqn.params)), Cost())
            if name in ("remat2", "checkpoint"):  # its name in older and newer JAX
                inner = inner._replace(kept=given.size, again=inner.kept)
            total += inner.times(times)
    return total


def _of_product(eqn: Any, macs: int) -> Cost:
    given, taken = eqn.outvars[0].aval.size, eqn.invars[0].aval.size
    return Cost(macs, given, given + taken)
