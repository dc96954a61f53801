"""DenseNet-BC (Huang et al. 2017, arXiv 1608.06993): CIFAR depths, and DenseNet-121 as torchvision's.

A width multiplies the growth rate: floor(k * width) (official code, METHODS.md 1.5 c, d).
CIFAR: base block is the 3x3 convolution to 2k channels (k of the full width); branch: three dense blocks,
the first two with their transitions. DenseNet-121: base block up to the first transition; branch: the other
three dense blocks, without the transition that the official code has after the last one.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from ekd_jax.models.blocks import Head, Norm, Stem
from ekd_jax.models.family import Architecture, Family, NetworkOptions, scale_channels
from ekd_jax.models.initializers import (
    Initializer,
    constant,
    kaiming_fan_in,
    kaiming_fan_out,
    torch_default,
)
from ekd_jax.models.layers import Array, BatchNorm, Conv, Mode, average_pool, moments, relu


class DenseStage(nn.Module):
    """Layers BN-ReLU-1x1(4 growth)-BN-ReLU-3x3(growth), each appended to what it read; then, unless it is
    the last stage, a transition: BN-ReLU-1x1 to half the channels, 2x2 average pooling."""

    growth: int
    layers: int
    transition: bool
    kernel_init: Initializer = kaiming_fan_out

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        known = moments(x, mode)  # channels keep theirs, however many layers read them
        for i in range(1, self.layers + 1):
            y = relu(BatchNorm(name=f"layer{i}_bn1")(x, mode, known))
            y = Conv(4 * self.growth, 1, kernel_init=self.kernel_init, name=f"layer{i}_conv1")(y, mode)
            y = relu(BatchNorm(name=f"layer{i}_bn2")(y, mode))
            y = Conv(self.growth, 3, kernel_init=self.kernel_init, name=f"layer{i}_conv2")(y, mode)
            x = jnp.concatenate([x, y], -1)
            known = jax.tree.map(lambda a, b: jnp.concatenate([a, b], -1), known, moments(y, mode))
        if not self.transition:
            return x
        x = relu(BatchNorm(name="transition_bn")(x, mode, known))
        x = Conv(x.shape[-1] // 2, 1, kernel_init=self.kernel_init, name="transition_conv")(x, mode)
        return average_pool(x, 2, 2)


def _densenet(
    widths: Sequence[Fraction],
    options: NetworkOptions,
    growth: int,
    layers: Sequence[int],
    stem: partial,
    kernel_init: Initializer,
) -> Architecture:
    return Architecture(
        stem=stem,
        stages=[
            partial(DenseStage, scale_channels(growth, width), number, i < len(layers), kernel_init)
            for i, (width, number) in enumerate(zip(widths, layers, strict=True), 1)
        ],
        head=partial(
            Head, options.num_classes, before=Norm, dropout=options.dropout_or(0.0), bias_init=constant(0.0)
        ),
        unpackable="a DenseNet's layers append channels, and packed students' would come to lie in turns",
    )


def densenet_cifar(
    widths: Sequence[Fraction], options: NetworkOptions, *, growth: int, depth: int
) -> Architecture:
    """Three stages of (depth - 4) / 6 layers."""
    stem = partial(Conv, 2 * growth, kernel_init=torch_default)
    return _densenet(widths, options, growth, [(depth - 4) // 3 // 2] * 3, stem, kaiming_fan_out)


def densenet_imagenet(
    widths: Sequence[Fraction], options: NetworkOptions, *, layers: tuple[int, ...]
) -> Architecture:
    """Four stages, growth 32."""
    stem = partial(Stem, 64, size=7, stride=2, pool=True, kernel_init=kaiming_fan_in)
    return _densenet(widths, options, 32, layers, stem, kaiming_fan_in)


MODELS = {
    **{
        f"densenet_bc_{growth}_{depth}": Family(partial(densenet_cifar, growth=growth, depth=depth), 3)
        for growth, depth in ((12, 100), (24, 250), (40, 190))
    },
    "densenet121": Family(partial(densenet_imagenet, layers=(6, 12, 24, 16)), stages=4, shared=1),
}
