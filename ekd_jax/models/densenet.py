"""DenseNet-BC (Huang et al. 2017, arXiv 1608.06993): CIFAR depths, and DenseNet-121 as torchvision's.

A width multiplies the growth rate: floor(k * width) (docs/reference/networks.md#densenet-bc).
CIFAR: the base block is the 3x3 convolution to 2k channels (k at full width). The branch is three dense
stages, the first two with a transition.
DenseNet-121: the base block ends with the first transition. The branch is the other three dense stages, without
the transition that the official code has after the last one (docs/reference/networks.md#densenet-121).
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from ekd_jax.models.blocks import Head, NormRelu, Part, Stem
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
    """A dense stage and, unless it is the last one, a transition.

    Each layer is BN, ReLU, 1x1 to 4 * growth, BN, ReLU, 3x3 to `growth` channels, which are appended to its
    input. The transition is BN, ReLU, 1x1 to half the channels, and 2x2 average pooling.
    """

    growth: int
    layers: int
    transition: bool
    kernel_init: Initializer = kaiming_fan_out

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        x_moments = moments(x, mode)  # appended channels leave the moments of earlier ones as they are
        for i in range(1, self.layers + 1):
            y = relu(BatchNorm(name=f"layer{i}_bn1")(x, mode, x_moments))
            y = Conv(4 * self.growth, 1, kernel_init=self.kernel_init, name=f"layer{i}_conv1")(y, mode)
            y = relu(BatchNorm(name=f"layer{i}_bn2")(y, mode))
            y = Conv(self.growth, 3, kernel_init=self.kernel_init, name=f"layer{i}_conv2")(y, mode)
            x = jnp.concatenate([x, y], -1)
            x_moments = jax.tree.map(lambda a, b: jnp.concatenate([a, b], -1), x_moments, moments(y, mode))
        if not self.transition:
            return x
        x = relu(BatchNorm(name="transition_bn")(x, mode, x_moments))
        x = Conv(x.shape[-1] // 2, 1, kernel_init=self.kernel_init, name="transition_conv")(x, mode)
        return average_pool(x, 2, 2)


def _densenet(
    widths: Sequence[Fraction],
    options: NetworkOptions,
    growth: int,
    layers: Sequence[int],
    stem: Part,
    kernel_init: Initializer,
) -> Architecture:
    return Architecture(
        stem=stem,
        stages=[
            partial(DenseStage, scale_channels(growth, width), number, i < len(layers), kernel_init)
            for i, (width, number) in enumerate(zip(widths, layers, strict=True), 1)
        ],
        head=partial(
            Head,
            options.num_classes,
            before=NormRelu,
            dropout=options.dropout_or(0.0),
            bias_init=constant(0.0),
        ),
        unpackable="a DenseNet's layers append channels, which would interleave those of packed students",
    )


def densenet_cifar(
    widths: Sequence[Fraction], options: NetworkOptions, *, growth: int, depth: int
) -> Architecture:
    """Build a network for 32x32 images: three stages of (depth - 4) / 6 layers."""
    stem = partial(Conv, 2 * growth, kernel_init=torch_default)
    return _densenet(widths, options, growth, [(depth - 4) // 3 // 2] * 3, stem, kaiming_fan_out)


def densenet_imagenet(
    widths: Sequence[Fraction], options: NetworkOptions, *, layers: tuple[int, ...]
) -> Architecture:
    """Build a network for ImageNet: four stages with a growth rate of 32."""
    stem = partial(Stem, 64, size=7, stride=2, pool=True, kernel_init=kaiming_fan_in)
    return _densenet(widths, options, 32, layers, stem, kaiming_fan_in)


MODELS = {
    **{
        f"densenet_bc_{growth}_{depth}": Family(partial(densenet_cifar, growth=growth, depth=depth), 3)
        for growth, depth in ((12, 100), (24, 250), (40, 190))
    },
    "densenet121": Family(partial(densenet_imagenet, layers=(6, 12, 24, 16)), stages=4, shared=1),
}
