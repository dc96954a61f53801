"""Definition of a family of networks, and conversion of widths to channels.

A family builds its network as a stem, stages and a head, each stage at its own width. Cutting the network
into base block and branches is the same for all families: `assemble`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from ekd_jax.common.errors import UserError
from ekd_jax.models.blocks import Part


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """The settings of a network other than its width.

    Attributes:
        num_classes: number of classes K.
        dropout: dropout rate before the classifier (for `wrn_*`: inside the blocks). A negative value
            means the family's default.
        stochastic_depth: rate at which residual branches are dropped. A negative value means the family's
            default.
        padding: "even" or "same" (see `convolution`) for networks that are published with both; ""
            means that of the official code.
    """

    num_classes: int
    dropout: float = -1.0
    stochastic_depth: float = -1.0
    padding: str = ""

    def dropout_or(self, default: float) -> float:
        """Return the dropout rate that was asked for, or the family's default."""
        return default if self.dropout < 0 else self.dropout

    def stochastic_depth_or(self, default: float) -> float:
        """Return the stochastic depth rate that was asked for, or the family's default."""
        return default if self.stochastic_depth < 0 else self.stochastic_depth


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network: `head(stages(stem(images)))`.

    Attributes:
        stem, stages, head: its parts.
        unpackable: why branches of different widths cannot run as one wide branch with block-diagonal
            kernels (see `execution`); "" if they can.
        first_blocks_separate: whether they can, except for the first block of each stage.
    """

    stem: Part
    stages: Sequence[Part]
    head: Part
    unpackable: str = "the network does not say that its students can run as one wide network"
    first_blocks_separate: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A network by name: how it is built at any width, and where it is cut by default.

    Attributes:
        build: function of (width multiplier of each stage, options) that returns the network.
        stages: number of stages.
        shared: how many of them belong to the base block by default.
        last_map: which feature map is matched last by default: the last "stage"'s output, or the map
            "pooled" for the classifier, where a layer lies between the two.
    """

    build: Callable[[Sequence[Fraction], NetworkOptions], Architecture]
    stages: int
    shared: int = 0
    last_map: str = "stage"


class CombinedWidth(Fraction):
    """The width of several networks side by side: the sum of their widths, which it remembers."""

    parts: tuple[Fraction, ...]

    def __new__(cls, parts: Sequence[Fraction]) -> "CombinedWidth":
        self = super().__new__(cls, sum(parts))
        self.parts = tuple(parts)
        return self


def scale_channels(channels: int, width: Fraction, multiple: int = 1) -> int:
    """Return channels * width, rounded down to a multiple of `multiple`.

    For a `CombinedWidth` it is the sum over the networks that are combined.

    Raises:
        UserError: no channel is left.
    """
    if isinstance(width, CombinedWidth):
        return sum(scale_channels(channels, part, multiple) for part in width.parts)
    scaled = math.floor(channels * width / multiple) * multiple
    if scaled == 0:
        raise UserError(
            f"model.students: width {float(width):g} leaves a block of {channels} channels with none; "
            f"the smallest usable width is {multiple / channels:g}"
        )
    return scaled


def make_divisible(channels: Fraction | float) -> int:
    """Return the multiple of 8 nearest to `channels`, but at least 90 % of it.

    MobileNets and EfficientNets scale their channels so (`make_divisible` in their official code).
    """
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near
