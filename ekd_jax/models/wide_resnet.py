"""Wide ResNets WRN-d-k for CIFAR (Zagoruyko, Komodakis 2016, arXiv 1605.07146), d = 6n + 4.

Base block: a 3x3 convolution to 16 channels. Branch: three stages of n pre-activation blocks with
floor(k * (16, 32, 64) * width) channels, then batch norm, ReLU and the classifier.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import flax.linen as nn

from ekd_jax.models.blocks import Head, NormRelu, Stage
from ekd_jax.models.family import Architecture, Family, NetworkOptions, scale_channels
from ekd_jax.models.layers import Array, BatchNorm, Conv, Dropout, Mode, relu


class PreActivationBlock(nn.Module):
    """A pre-activation residual block: BN, ReLU, conv, BN, ReLU, dropout, conv.

    The shortcut is x or, where the shape changes, a 1x1 convolution of the activated x.
    """

    features: int
    stride: int = 1
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        y = relu(BatchNorm(name="bn1")(x, mode))
        if x.shape[-1] != self.features or self.stride != 1:
            x = Conv(self.features, 1, self.stride, name="shortcut_conv")(y, mode)
        y = Conv(self.features, 3, self.stride, name="conv1")(y, mode)
        y = Dropout(self.dropout, name="drop")(relu(BatchNorm(name="bn2")(y, mode)), mode)
        return x + Conv(self.features, 3, name="conv2")(y, mode)


def wide_resnet(
    widths: Sequence[Fraction], options: NetworkOptions, *, depth: int, times: int
) -> Architecture:
    """Build a network of three stages of (depth - 4) / 6 blocks, `times` as wide as in a ResNet."""
    dropout = options.dropout_or(0.0)
    block = partial(PreActivationBlock, dropout=dropout)
    return Architecture(
        stem=partial(Conv, 16),
        stages=[
            partial(Stage, partial(block, scale_channels(times * c, width)), (depth - 4) // 6, stride)
            for c, width, stride in zip((16, 32, 64), widths, (1, 2, 2), strict=True)
        ],
        head=partial(Head, options.num_classes, before=NormRelu),
        unpackable="dropout between convolutions (model.dropout) is drawn per student" if dropout else "",
    )


SIZES = ((10, 1), (16, 1), (16, 2), (16, 4), (16, 8), (28, 2), (28, 4), (28, 10), (40, 1), (40, 2), (40, 4))
MODELS = {
    f"wrn_{depth}_{times}": Family(partial(wide_resnet, depth=depth, times=times), 3)
    for depth, times in SIZES
}
