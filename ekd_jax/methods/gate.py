"""The gate of ONE: a weight for every student and image."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import torch_default
from ekd_jax.models.layers import BatchNorm, Linear, Mode

Array = jax.Array


class Gate(nn.Module):
    """softmax(ReLU(BN(linear(GAP(base map))))), ONE's gate (METHODS.md 2)."""

    @nn.compact
    def __call__(self, outputs: Outputs, train: bool) -> Array:
        """(S, B)"""
        pooled = outputs.base.mean((1, 2), dtype=jnp.float32)
        scores = Linear(len(outputs.logits_SxBxK), torch_default, name="linear")(pooled)
        return nn.softmax(nn.relu(BatchNorm(name="bn")(scores, Mode(train)))).T
