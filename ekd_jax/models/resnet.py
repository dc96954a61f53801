"""ImageNet ResNets (He et al. 2015), ResNeXt (Xie et al. 2017), Wide-ResNet-2 (Zagoruyko et al. 2016).

They are torchvision's, as in the official code of the ensemble method (docs/reference/networks.md#imagenet-resnets).
Base block: 7x7/2 convolution, 3x3/2 max pooling, stage 1. Branch: stages 2 to 4 with floor((128, 256, 512) * width)
planes. A ResNeXt keeps its 32 groups for every student; only their width shrinks.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

from ekd_jax.models.blocks import BasicBlock, Block, Bottleneck, Head, Stage, Stem
from ekd_jax.models.family import Architecture, Family, NetworkOptions, scale_channels

PLANES = (64, 128, 256, 512)


def resnet(
    widths: Sequence[Fraction],
    options: NetworkOptions,
    *,
    block: Block,
    blocks: tuple[int, ...],
    unpackable: str = "",
) -> Architecture:
    """Build a network of four stages with these numbers of blocks."""
    return Architecture(
        stem=partial(Stem, PLANES[0], size=7, stride=2, pool=True),
        stages=[
            partial(Stage, partial(block, scale_channels(planes, width)), number, 1 if i == 0 else 2)
            for i, (planes, width, number) in enumerate(zip(PLANES, widths, blocks, strict=True))
        ],
        head=partial(Head, options.num_classes, dropout=options.dropout_or(0.0)),
        unpackable=unpackable,
    )


def _family(block: Block, *blocks: int, unpackable: str = "") -> Family:
    return Family(partial(resnet, block=block, blocks=blocks, unpackable=unpackable), stages=4, shared=1)


def _resnext(groups: int, base_width: int, *blocks: int) -> Family:
    block = partial(Bottleneck, groups=groups, base_width=base_width)
    return _family(block, *blocks, unpackable="packed students would share a ResNeXt's groups of channels")


wide = partial(Bottleneck, base_width=128)


MODELS = {
    "resnet18": _family(BasicBlock, 2, 2, 2, 2),
    "resnet34": _family(BasicBlock, 3, 4, 6, 3),
    "resnet50": _family(Bottleneck, 3, 4, 6, 3),
    "resnet101": _family(Bottleneck, 3, 4, 23, 3),
    "resnet152": _family(Bottleneck, 3, 8, 36, 3),
    "resnext50_32x4d": _resnext(32, 4, 3, 4, 6, 3),
    "resnext101_32x8d": _resnext(32, 8, 3, 4, 23, 3),
    "wide_resnet50_2": _family(wide, 3, 4, 6, 3),
    "wide_resnet101_2": _family(wide, 3, 4, 23, 3),
}
