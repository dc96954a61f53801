"""VGG for CIFAR (Simonyan, Zisserman 2015) with batch norm and one linear layer, as in RepDistiller.

Base block: the first group of convolutions. Branch: the other four groups, with 2x2 max pooling before each as
long as the map is larger than 4x4.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import flax.linen as nn

from ekd_jax.models.blocks import Head
from ekd_jax.models.family import Architecture, Family, NetworkOptions, scale_channels
from ekd_jax.models.initializers import constant
from ekd_jax.models.layers import Array, BatchNorm, Conv, Mode, max_pool, relu

CHANNELS = (64, 128, 256, 512, 512)


class Group(nn.Module):
    """Max pooling, if the map is large, and convolutions with bias, batch norm and ReLU."""

    features: int
    convolutions: int
    pool: bool = True

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        if self.pool and min(x.shape[1:3]) > 4:
            x = max_pool(x, 2, 2)
        for i in range(1, self.convolutions + 1):
            x = Conv(self.features, bias_init=constant(0.0), name=f"conv{i}")(x, mode)
            x = relu(BatchNorm(name=f"bn{i}")(x, mode))
        return x


def vgg(
    widths: Sequence[Fraction], options: NetworkOptions, *, convolutions: tuple[int, ...]
) -> Architecture:
    """Build a network of five groups of convolutions with floor(channels * width) channels."""
    groups = [
        partial(Group, scale_channels(channels, width), number)
        for channels, width, number in zip(CHANNELS, (Fraction(1), *widths), convolutions, strict=True)
    ]
    head = partial(Head, options.num_classes, dropout=options.dropout_or(0.0))
    return Architecture(partial(groups[0], pool=False), groups[1:], head, unpackable="")


MODELS = {
    f"vgg{depth}": Family(partial(vgg, convolutions=convolutions), stages=4)
    for depth, convolutions in {
        8: (1, 1, 1, 1, 1),
        11: (1, 1, 2, 2, 2),
        13: (2, 2, 2, 2, 2),
        16: (2, 2, 3, 3, 3),
        19: (2, 2, 4, 4, 4),
    }.items()
}
