"""CIFAR ResNets (He et al. 2015): stem of one convolution, three stages, depths 6n + 2 or 9n + 2.

`resnet20` ... `resnet110`: projection shortcuts (option B) and Xavier-normal weights, as in the official
    code of the ensemble method (docs/reference/networks.md#cifar-resnets).
`resnet20_a` ...: shortcuts without parameters (option A), as in the paper; Snapshot Ensembles use them.
`resnet8x4`, `resnet14x4`, `resnet32x4`: 32-64-128-256 channels, as in RepDistiller.
`resnet110_one`: ONE's "ResNet-110", with 18 bottleneck blocks per stage (docs/reference/one.md#networks).
`resnet110_bottleneck`: 12 bottleneck blocks per stage, the 110 layers of OKDDip and PCL
    (docs/reference/okddip.md#protocol).
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

from ekd_jax.models.blocks import BasicBlock, Block, Bottleneck, Head, Stage, Stem
from ekd_jax.models.family import Architecture, Family, NetworkOptions, scale_channels
from ekd_jax.models.initializers import Initializer, kaiming_fan_out, torch_default, xavier_normal

CHANNELS = (16, 16, 32, 64)  # stem and three stages


def resnet(
    widths: Sequence[Fraction],
    options: NetworkOptions,
    *,
    depth: int,
    block: Block = BasicBlock,
    channels: tuple[int, ...] = CHANNELS,
    kernel_init: Initializer = kaiming_fan_out,
    head_init: Initializer = torch_default,
    shortcut: str = "project",
) -> Architecture:
    """Build a network of three stages of (depth - 2) / 6 blocks with floor(channels * width) channels."""
    stem, *full = channels
    return Architecture(
        stem=partial(Stem, stem, kernel_init=kernel_init),
        stages=[
            partial(
                Stage,
                partial(block, scale_channels(c, width), shortcut=shortcut, kernel_init=kernel_init),
                blocks=(depth - 2) // 6,
                stride=1 if i == 0 else 2,
            )
            for i, (c, width) in enumerate(zip(full, widths, strict=True))
        ],
        head=partial(Head, options.num_classes, dropout=options.dropout_or(0.0), kernel_init=head_init),
        unpackable="",
        first_blocks_separate=shortcut == "pad",  # each student pads its own channels
    )


DEPTHS = (8, 14, 20, 32, 44, 56, 110)
official = partial(resnet, kernel_init=xavier_normal, head_init=xavier_normal)
option_a = partial(resnet, shortcut="pad")
wide = partial(resnet, channels=(32, 64, 128, 256))

MODELS = {
    **{f"resnet{depth}": Family(partial(official, depth=depth), 3) for depth in DEPTHS},
    **{f"resnet{depth}_a": Family(partial(option_a, depth=depth), 3) for depth in DEPTHS},
    **{f"resnet{depth}x4": Family(partial(wide, depth=depth), 3) for depth in (8, 14, 32)},
    "resnet110_one": Family(partial(resnet, depth=110, block=Bottleneck), 3),
    "resnet110_bottleneck": Family(partial(resnet, depth=74, block=Bottleneck), 3),  # 9 * 12 + 2 layers
}
