"""The gate of ONE: weights for the students, for each image."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import BatchNorm, Linear, Mode

Array = jax.Array


class Gate(nn.Module):
    """Weights for the students, per image, from the base block's feature map.

        g = softmax(ReLU(BN(linear(GAP(map)))))

    The map is pooled, and all that follows computed, in float32, whatever the dtype of the map (bfloat16 if
    convolutions compute in it). The official code computes in the map's dtype, which is float32 there.

    References:
        Lan, Zhu, Gong, NeurIPS 2018 (docs/reference/kd_losses.md#gate).
    """

    @nn.compact
    def __call__(self, outputs: Outputs, train: bool) -> Array:
        """Return the students' weights, (S, B), whose sum over the students is 1."""
        pooled = outputs.base.mean((1, 2), dtype=jnp.float32)
        scores = Linear(len(outputs.logits_SxBxK), torch_default, name="linear")(pooled)
        return nn.softmax(nn.relu(BatchNorm(name="bn")(scores, Mode(train)))).T
