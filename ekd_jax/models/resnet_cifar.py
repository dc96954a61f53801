"""CIFAR ResNets of depth 6n+2 with projection shortcuts (official code: models/ResNet_cifar.py).

Base block: conv3x3(16) - BN - ReLU. Branch: three stages of n basic blocks with
floor((16, 32, 64) * width) channels, global average pooling, linear classifier.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ekd_jax.models.ensemble import Ensemble, scaled_widths
from ekd_jax.models.layers import Array, BatchNorm, Conv, Linear

CHANNELS = (16, 32, 64)


class Base(nn.Module):
    """(B, H, W, C) images -> (B, H, W, 16)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = Conv(CHANNELS[0], dtype=self.dtype, name="conv")(x)
        return nn.relu(BatchNorm(name="bn")(x, train))


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus shortcut, ReLU; the shortcut projects (option B) if shapes differ."""

    features: int
    stride: int
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, _: None = None) -> tuple[Array, None]:
        conv = partial(Conv, self.features, dtype=self.dtype)
        y = conv(stride=self.stride, name="conv1")(x)
        y = nn.relu(BatchNorm(name="bn1")(y, self.train))
        y = BatchNorm(name="bn2")(conv(name="conv2")(y), self.train)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv(size=1, stride=self.stride, name="shortcut_conv")(x)
            x = BatchNorm(name="shortcut_bn")(x, self.train)
        return nn.relu(x + y), None


class Stage(nn.Module):
    """`first` may change width and resolution; the equal blocks after it are stored stacked in
    `rest`, (n-1, ...) a leaf, and scanned: one block to trace and to compile instead of n-1."""

    features: int
    stride: int
    blocks: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x, _ = BasicBlock(self.features, self.stride, train, self.dtype, name="first")(x)
        if self.blocks > 1:
            rest = nn.scan(
                BasicBlock,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=self.blocks - 1,
            )
            x, _ = rest(self.features, 1, train, self.dtype, name="rest")(x, None)
        return x


class Branch(nn.Module):
    """(B, H, W, 16) -> logits (B, K) float32 and the three stages' maps (B, H/2^b, W/2^b, c_b)."""

    widths: tuple[int, int, int]
    blocks: int
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, tuple[Array, ...]]:
        maps = []
        for i, features in enumerate(self.widths):
            stride = 1 if i == 0 else 2
            x = Stage(features, stride, self.blocks, self.dtype, name=f"stage{i + 1}")(x, train)
            maps.append(x)
        pooled = x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return Linear(self.num_classes, name="head")(pooled), tuple(maps)


def build(
    *,
    depth: int,
    students: Sequence[Fraction],
    no_blocks: int,
    num_classes: int,
    dtype: Any,
    base_gradients: str,
) -> Ensemble:
    """A CIFAR ResNet of `depth` = 6n+2 layers, its last `no_blocks` stages compressed."""
    widths = [scaled_widths(CHANNELS, width, no_blocks) for width in students]
    blocks = (depth - 2) // 6
    return Ensemble(
        base=Base(dtype),
        branches=tuple(Branch(w, blocks, num_classes, dtype) for w in widths),  # type: ignore[arg-type]
        students=tuple(students),
        compressed=tuple(range(3 - no_blocks, 3)),
        base_gradients=base_gradients,
    )


MODELS = {f"resnet{depth}": partial(build, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)}
