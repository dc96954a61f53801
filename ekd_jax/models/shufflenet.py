"""ShuffleNet V1 (Zhang et al. 2018, arXiv 1707.01083) and V2 (Ma et al. 2018, arXiv 1807.11164).

`shufflenet_v2_x1_0` and its other sizes: torchvision's networks for ImageNet.
`shufflenet_v1_cifar` (3 groups), `shufflenet_v2_cifar`: RepDistiller's networks for 32x32 images, whose stem is a
1x1 convolution.
Base block: the stem. Branch: three stages, each a block with stride 2 followed by equal blocks.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from ekd_jax.common.errors import UserError
from ekd_jax.models.blocks import Block, Head, Part, Stage, Stem
from ekd_jax.models.family import Architecture, Family, NetworkOptions, scale_channels
from ekd_jax.models.layers import Array, BatchNorm, Conv, ConvNorm, Mode, average_pool, relu

BLOCKS = (4, 8, 4)
UNPACKABLE = "a ShuffleNet would shuffle channels between packed students"


def shuffle(x: Array, groups: int) -> Array:
    """Reorder channels: the first of every group, then the second of every group, and so on."""
    return x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(x.shape)


class BlockV1(nn.Module):
    """A grouped 1x1 convolution, shuffle, a depthwise one, and a grouped 1x1 one.

    The result is added to x, or with stride 2 appended to the pooled x. In the network's first block the
    first convolution is not grouped.
    """

    features: int
    stride: int = 1
    groups: int = 3
    first_groups: int = 3

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        features = self.features - x.shape[-1] if self.stride == 2 else self.features
        middle = features // 4
        groups = self.first_groups if self.stride == 2 else self.groups
        y = ConvNorm(middle, 1, groups=groups, name="reduce")(x, mode)
        y = ConvNorm(middle, 3, self.stride, middle, name="depthwise")(shuffle(y, groups), mode)
        y = Conv(features, 1, groups=self.groups, name="conv")(y, mode)
        y = BatchNorm(name="bn")(y, mode)
        if self.stride == 1:
            return relu(x + y)
        return relu(jnp.concatenate([y, average_pool(x, 3, 2)], -1))


class BlockV2(nn.Module):
    """A 1x1, a depthwise and a 1x1 convolution on half of the channels.

    With stride 2 they run on all channels, and a depthwise and a 1x1 convolution in parallel.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        half = self.features // 2
        if self.stride == 1:
            left, y = jnp.split(x, 2, -1)
        else:
            left = self._depthwise(x, mode, "left_depthwise")
            left, y = ConvNorm(half, 1, name="left_expand")(left, mode), x
        y = ConvNorm(half, 1, name="reduce")(y, mode)
        y = ConvNorm(half, 1, name="expand")(self._depthwise(y, mode, "depthwise"), mode)
        return shuffle(jnp.concatenate([left, y], -1), 2)

    def _depthwise(self, x: Array, mode: Mode, name: str) -> Array:
        width = x.shape[-1]
        return ConvNorm(width, 3, self.stride, width, activation=lambda y: y, name=name)(x, mode)


def _stages(blocks: Sequence[Block]) -> list[Part]:
    return [partial(Stage, block, number, 2) for block, number in zip(blocks, BLOCKS, strict=True)]


def shufflenet_v2(
    widths: Sequence[Fraction], options: NetworkOptions, *, channels: Sequence[int], stem: Part
) -> Architecture:
    """Build a network of three stages and a 1x1 convolution.

    Their numbers of channels are `channels` times the width, rounded down to even numbers.
    """
    *stages, last = channels
    return Architecture(
        stem=stem,
        stages=_stages(
            [partial(BlockV2, scale_channels(c, w, 2)) for c, w in zip(stages, widths, strict=True)]
        ),
        head=partial(
            Head,
            options.num_classes,
            partial(ConvNorm, scale_channels(last, widths[-1]), 1),
            options.dropout_or(0.0),
        ),
        unpackable=UNPACKABLE,
    )


def shufflenet_v1(widths: Sequence[Fraction], options: NetworkOptions) -> Architecture:
    """Build a network of 3 groups and 240, 480, 960 channels times the width.

    Channels are multiples of 12, so that all groups are equal.
    """
    stem, groups = 24, 3
    numbers = [scale_channels(c, w, 4 * groups) for c, w in zip((240, 480, 960), widths, strict=True)]
    for before, after in zip((stem, *numbers), numbers, strict=False):
        if after <= before:
            raise UserError(
                f"model.students: a width leaves a stage of shufflenet_v1_cifar {after} channels, {before} "
                f"of them of the stage before: the smallest usable width is {36 / 240:g}"
            )
    blocks = [
        partial(BlockV1, c, groups=groups, first_groups=1 if i == 0 else groups)
        for i, c in enumerate(numbers)
    ]
    head = partial(Head, options.num_classes, dropout=options.dropout_or(0.0))
    return Architecture(partial(Stem, stem, size=1), _stages(blocks), head, UNPACKABLE)


imagenet = partial(Stem, 24, stride=2, pool=True)
MODELS = {
    "shufflenet_v1_cifar": Family(shufflenet_v1, stages=3),
    "shufflenet_v2_cifar": Family(
        partial(shufflenet_v2, channels=(116, 232, 464, 1024), stem=partial(Stem, 24, size=1)), stages=3
    ),
    **{
        f"shufflenet_v2_{size}": Family(partial(shufflenet_v2, channels=channels, stem=imagenet), stages=3)
        for size, channels in {
            "x0_5": (48, 96, 192, 1024),
            "x1_0": (116, 232, 464, 1024),
            "x1_5": (176, 352, 704, 1024),
            "x2_0": (244, 488, 976, 2048),
        }.items()
    },
}
