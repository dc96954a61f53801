"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381), and the stages that EfficientNet shares with it.

`mobilenet_v2`: torchvision's network for ImageNet, with channels rounded to multiples of 8.
`mobilenet_v2_cifar`: RepDistiller's network for 32x32 images, at half the width (`mobile_half`).
Base block: the stem. Branch: the inverted residuals down to 1/8, 1/16 and 1/32 of the image, and a 1x1
convolution to 1280 channels before the classifier. The width multiplies these, too, which is our choice:
published MobileNets keep 1280 below width 1.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

import flax.linen as nn

from ekd_jax.models.blocks import Block, Chain, Head, InvertedResidual, Part, Stage, Stem
from ekd_jax.models.family import Architecture, Family, NetworkOptions, make_divisible, scale_channels
from ekd_jax.models.initializers import constant, normal
from ekd_jax.models.layers import ConvNorm, relu

# For each stage: rows of expansion, channels, blocks, stride, kernel size.
Settings = tuple[tuple[tuple[int, int, int, int, int], ...], ...]
IMAGENET: Settings = (
    ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3)),
    ((6, 64, 4, 2, 3), (6, 96, 3, 1, 3)),
    ((6, 160, 3, 2, 3), (6, 320, 1, 1, 3)),
)
CIFAR: Settings = (((1, 16, 1, 1, 3), (6, 24, 2, 1, 3), (6, 32, 3, 2, 3)), *IMAGENET[1:])
UNPACKABLE = "the width decides which of its inverted residuals add their input"


def inverted_residual_stages(
    settings: Settings, widths: Sequence[Fraction], channels: Callable[[int, Fraction], int], block: Block
) -> list[Part]:
    """Return stages of inverted residuals.

    Args:
        settings: the settings of each stage.
        widths: the width multiplier of each stage.
        channels: function of (channels at full width, multiplier) that returns the number of channels.
        block: an `InvertedResidual` that lacks only what `settings` define.
    """
    stages: list[Part] = []
    number = 0
    for rows, width in zip(settings, widths, strict=True):
        parts = []
        for expand, full, blocks, stride, size in rows:
            number += 1
            one = partial(block, channels(full, width), expand=expand, size=size)
            parts.append((f"mb{number}", partial(Stage, one, blocks, stride)))
        stages.append(partial(Chain, tuple(parts)))
    return stages


def mobilenet_v2(widths: Sequence[Fraction], options: NetworkOptions) -> Architecture:
    """Build a network for ImageNet, torchvision's at width 1."""
    block = partial(InvertedResidual, stochastic_depth=options.stochastic_depth_or(0.0))
    before = partial(ConvNorm, make_divisible(1280 * widths[-1]), 1, activation=nn.relu6)
    return Architecture(
        stem=partial(Stem, 32, stride=2, activation=nn.relu6),
        stages=inverted_residual_stages(
            IMAGENET, widths, lambda c, width: make_divisible(c * width), block
        ),
        head=partial(
            Head,
            options.num_classes,
            before,
            options.dropout_or(0.2),
            kernel_init=normal(0.01),
            bias_init=constant(0.0),
        ),
        unpackable=UNPACKABLE,
    )


def mobilenet_v2_cifar(widths: Sequence[Fraction], options: NetworkOptions) -> Architecture:
    """Build a network for 32x32 images, RepDistiller's `mobile_half` at width 1.

    It has half the channels, ReLU, and blocks that all expand.
    """
    block = partial(
        InvertedResidual,
        activation=relu,
        always_expand=True,
        stochastic_depth=options.stochastic_depth_or(0.0),
    )
    before = partial(ConvNorm, scale_channels(1280, widths[-1]), 1)
    return Architecture(
        stem=partial(Stem, 16, stride=2),
        stages=inverted_residual_stages(
            CIFAR, widths, lambda c, width: scale_channels(c, width / 2), block
        ),
        head=partial(Head, options.num_classes, before, options.dropout_or(0.0)),
        unpackable=UNPACKABLE,
    )


MODELS = {
    "mobilenet_v2": Family(mobilenet_v2, stages=3),
    "mobilenet_v2_cifar": Family(mobilenet_v2_cifar, stages=3),
}
