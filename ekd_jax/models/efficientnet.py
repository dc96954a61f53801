"""EfficientNet-B0 to B7 (Tan, Le 2019, arXiv 1905.11946), as in the official code of the ensemble method.

Details: docs/reference/networks.md#efficientnet. Base block: 3x3/2 stem. Branch: the inverted residuals down to
1/8, 1/16 and 1/32 of the image, with channels scaled by the network's width times the student's. The last map is
the 1280-channel one that is pooled; with model.last_map=stage it is the 320-channel map before it (the paper's
Figure 2a). Stochastic depth is .2 for every block, and padding is "same", TensorFlow's. Weights of torchvision need
"even" padding and, from B5 on, a batch norm epsilon of 1e-3; those of TensorFlow "same" and 1e-3.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import flax.linen as nn

from ekd_jax.models.blocks import Head, InvertedResidual, Stem
from ekd_jax.models.family import Architecture, Family, NetworkOptions, make_divisible
from ekd_jax.models.initializers import constant, uniform
from ekd_jax.models.layers import ConvNorm
from ekd_jax.models.mobilenet_v2 import UNPACKABLE, Settings, inverted_residual_stages

SETTINGS: Settings = (
    ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5)),
    ((6, 80, 3, 2, 3), (6, 112, 3, 1, 5)),
    ((6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
)


def channels(full: int, width: Fraction) -> int:
    """Return `full` at width 1, whatever it is, and otherwise a multiple of 8."""
    return full if width == 1 else make_divisible(full * width)


def efficientnet(
    widths: Sequence[Fraction], options: NetworkOptions, *, width: str, depth: str, dropout: float
) -> Architecture:
    """Build a network with `width` times the channels and `depth` times the blocks of B0."""
    own, padding = Fraction(width), options.padding or "same"
    block = partial(
        InvertedResidual,
        squeeze=4,
        activation=nn.silu,
        padding=padding,
        stochastic_depth=options.stochastic_depth_or(0.2),
    )
    settings = tuple(
        tuple((t, c, math.ceil(Fraction(depth) * n), s, k) for t, c, n, s, k in rows) for rows in SETTINGS
    )
    scaled_widths = [own * w for w in widths]
    before = partial(ConvNorm, channels(1280, scaled_widths[-1]), 1, activation=nn.silu)
    return Architecture(
        stem=partial(Stem, channels(32, own), stride=2, padding=padding, activation=nn.silu),
        stages=inverted_residual_stages(settings, scaled_widths, channels, block),
        head=partial(
            Head,
            options.num_classes,
            before,
            options.dropout_or(dropout),
            kernel_init=uniform(1 / math.sqrt(options.num_classes)),
            bias_init=constant(0.0),
        ),
        unpackable=UNPACKABLE,
    )


MODELS = {
    f"efficientnet_b{i}": Family(
        partial(efficientnet, width=width, depth=depth, dropout=dropout), stages=3, last_map="pooled"
    )
    for i, (width, depth, dropout) in enumerate(
        [
            ("1.0", "1.0", 0.2),
            ("1.0", "1.1", 0.2),
            ("1.1", "1.2", 0.3),
            ("1.2", "1.4", 0.3),
            ("1.4", "1.8", 0.4),
            ("1.6", "2.2", 0.4),
            ("1.8", "2.6", 0.5),
            ("2.0", "3.1", 0.5),
        ]
    )
}
