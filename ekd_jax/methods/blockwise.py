"""Block-wise compression under a budget, with knowledge distillation.

The paper gives each block a lightweight structure under a budget of operations or parameters that the user
chooses, with a KD loss from the uncompressed network. Its code was not found and its loss is not verified:
all of this is a reconstruction, after MorphNet. A block is a stage of the network here.

References:
    Ahmed, Zunino, Morerio, Murino, "Compact CNN Structure Learning by Knowledge Distillation", ICPR 2020,
    arXiv 2104.09191 (docs/reference/blockwise.md).
    Gordon et al., "MorphNet: Fast & Simple Resource-Constrained Structure Learning of Deep Networks", CVPR
    2018.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ekd_jax.common.knob import NOT_NEGATIVE, Rule, one_of
from ekd_jax.methods.base import Batch, Terms, knob
from ekd_jax.methods.kd import KD
from ekd_jax.models.ensemble import Outputs

Array = jax.Array
COSTS = one_of(("macs", "parameters"))
SHARE = Rule(lambda value: 0 < value < 1, "be above 0 and below 1")


class BlockwiseSearch(KD):
    """The search of block-wise compression: KD with a penalty on the scales of student 1's batch norms.

        L = L_KD + strength sum_b cost_b mean |scale_b|

    scale_b are the scales of all batch norms of stage b, and cost_b is the share of the network's
    multiply-accumulates or parameters in that stage's convolutions. Channels that are not worth their cost
    lose their scale.
    """

    part_of = "blockwise"

    cost: str = knob("macs", "What the penalty charges: multiply-accumulates or parameters.", COSTS)
    strength: float = knob(0.1, "Weight of the penalty.", NOT_NEGATIVE)

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
            scales = batch_norm_scales(network[name])
            magnitudes = jnp.concatenate([jnp.abs(scale).ravel() for scale in scales])
            terms[f"student_1/scale_{name}"] = magnitudes.mean()
            penalty += size / sum(sizes) * magnitudes.mean()
        terms["student_1/loss_penalty"] = penalty
        return loss + self.strength * penalty, terms


class Blockwise(KD):
    """Block-wise compression under a budget, a reconstruction (Ahmed et al., ICPR 2020).

    An earlier run trains by `BlockwiseSearch`. The smallest of all its scales are then removed, as few as
    bring the network under the budget; each stage keeps the share of its channels whose scales are left.
    A network of these widths is trained from new initial values, as in MorphNet, by the loss of `KD`.
    """

    budget: float = knob(
        0.5, "Multiply-accumulates or parameters of the result, as a share of the whole network's.", SHARE
    )
    cost: str = knob("macs", "What the budget counts: multiply-accumulates or parameters.", COSTS)
    strength: float = knob(0.1, "Weight of the penalty in the search.", NOT_NEGATIVE)
    search_epochs: float = knob(0.0, "Epochs of the search; 0: train.epochs.", NOT_NEGATIVE)


def batch_norm_scales(stage: Mapping[str, Any]) -> list[Array]:
    """Return the scales of all batch norms among the parameters of a stage."""
    leaves = jax.tree_util.tree_leaves_with_path(stage)
    return [leaf for path, leaf in leaves if path[-1].key == "scale"]
