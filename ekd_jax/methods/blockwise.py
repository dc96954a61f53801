"""A structure for every block under a budget, learned with knowledge distillation.

The task of "Compact CNN Structure Learning by Knowledge Distillation" (Ahmed, Zunino, Morerio, Murino, ICPR
2020, arXiv 2104.09191): a lightweight structure of each block under a budget of operations or parameters
that the user chooses, with a KD loss from the uncompressed network. The paper's code was not found and its
loss is not verified: all below is a reconstruction, after MorphNet (Gordon et al., CVPR 2018; METHODS.md
11). A block is a stage of the network here.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ekd_jax.common.errors import UserError
from ekd_jax.methods.base import Batch, Terms, check_above, check_choice, check_not_negative
from ekd_jax.methods.kd import Kd
from ekd_jax.models.ensemble import Outputs

Array = jax.Array
COSTS = ("macs", "parameters")


class BlockwiseSearch(Kd):
    """The first stage: L = L_KD + strength * sum over stages b of cost_b * mean |scale_b|, student 1's.

    scale_b are the scales of all batch norms of stage b, and cost_b the share of the network's
    multiply-accumulates or parameters that the stage's convolutions have. Channels that are not worth
    their cost lose their scale.

    Attributes:
        cost: "macs" or "parameters".
        strength: of the penalty.
    """

    cost: str = "macs"
    strength: float = 0.1

    def __post_init__(self) -> None:
        check_choice(self, "cost", COSTS)
        check_not_negative(self, "strength")
        super().__post_init__()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        loss, terms = super().__call__(outputs, batch)
        network = batch.networks["students"]["1"]
        stages = sorted(name for name in network if name.startswith("stage"))
        pixels = [row[0].shape[1] * row[0].shape[2] for row in outputs.features]
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(network[name])) for name in stages]
        if self.cost == "macs":
            sizes = [size * area for size, area in zip(sizes, pixels, strict=True)]
        penalty = jnp.zeros(())
        for name, size in zip(stages, sizes, strict=True):
            scales = jnp.concatenate([jnp.abs(scale).ravel() for scale in scales_of(network[name])])
            terms[f"student_1/scale_{name}"] = scales.mean()
            penalty += size / sum(sizes) * scales.mean()
        terms["student_1/loss_penalty"] = penalty
        return loss + self.strength * penalty, terms


class Blockwise(Kd):
    """Both stages: `BlockwiseSearch`, then a network of the widths that it found, from new initial values
    (as MorphNet does), by `Kd`.

    Of all scales the smallest are left out, as few as bring the network under the budget; a stage keeps
    the share of its channels that is left.

    Attributes:
        budget: multiply-accumulates or parameters, as a share of the whole network's.
        cost: what the budget counts, "macs" or "parameters".
        strength: of the penalty of the search.
        search_epochs: of the first stage; 0: as the second's, `train.epochs`.
    """

    budget: float = 0.5
    cost: str = "macs"
    strength: float = 0.1
    search_epochs: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self, "cost", COSTS)
        check_above(self, "budget")
        check_not_negative(self, "strength", "search_epochs")
        if self.budget >= 1:
            raise UserError(f"method.budget={self.budget:g} must be below 1, the whole network")
        super().__post_init__()


def scales_of(stage: Any) -> list[Array]:
    """The scales of a stage's batch norms."""
    leaves = jax.tree_util.tree_leaves_with_path(stage)
    return [leaf for path, leaf in leaves if path[-1].key == "scale"]
