"""A family of networks, and how an ensemble is made of it.

A family knows how to build its network, stem, stages and head, with every stage at a width of its
own. Cutting it into base block and branches happens here, for all families alike.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from ekd_jax.errors import UserError
from ekd_jax.models.blocks import Chain, Part
from ekd_jax.models.ensemble import Branch, Ensemble
from ekd_jax.models.layers import Mode


@dataclasses.dataclass(frozen=True)
class Options:
    """What a network can be asked for beside its width.

    Attributes:
        num_classes: K.
        dropout: rate before the classifier (`wrn_*`: in the blocks); below 0: the family's own.
        stochastic_depth: rate at which residual blocks are left out; below 0: the family's own.
        padding: "even" or "same" (see `convolution`) of networks that exist with both; "": the official
            code's.
    """

    num_classes: int
    dropout: float = -1.0
    stochastic_depth: float = -1.0
    padding: str = ""

    def dropout_or(self, own: float) -> float:
        """The rate, `own` being the family's."""
        return own if self.dropout < 0 else self.dropout

    def stochastic_depth_or(self, own: float) -> float:
        """The rate, `own` being the family's."""
        return own if self.stochastic_depth < 0 else self.stochastic_depth


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network: `head(stages(stem(images)))`."""

    stem: Part
    stages: Sequence[Part]
    head: Part


@dataclasses.dataclass(frozen=True)
class Family:
    """What a name stands for.

    Attributes:
        build: (width multiplier of each stage, options) -> the network.
        stages: how many there are.
        shared: how many of them belong to the base block.
        last_map: the last of the maps that students are compared by: the last "stage"'s, or the one that
            is "pooled" for the classifier, where something lies between.
    """

    build: Callable[[Sequence[Fraction], Options], Architecture]
    stages: int
    shared: int = 0
    last_map: str = "stage"


def scaled(channels: int, width: Fraction, multiple: int = 1) -> int:
    """channels * width, rounded down to a multiple of `multiple`.

    Raises:
        UserError: nothing is left.
    """
    scaled = math.floor(channels * width / multiple) * multiple
    if scaled == 0:
        least = multiple / channels
        raise UserError(
            f"model.students: width {float(width):g} leaves a block of {channels} channels with none; "
            f"the smallest usable width is {least:g}"
        )
    return scaled


def rounded(channels: Fraction | float) -> int:
    """The multiple of 8 nearest to `channels`, but never below 90 % of it: how MobileNets and
    EfficientNets scale (make_divisible of their official code)."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


def assemble(
    family: Family,
    students: Sequence[Fraction],
    options: Options,
    mode: Mode,
    no_blocks: int = 0,
    shared_stages: int = -1,
    last_map: str = "",
    base_gradients: str = "all",
) -> Ensemble:
    """The base block and one branch for each width in `students`.

    Args:
        family: of the network.
        students: width multipliers above 0; the first is the pseudo teacher's.
        options: of the network.
        mode: dtype and batch norm.
        no_blocks: how many of the branch's stages, from the last, the multipliers change; 0: all.
        shared_stages: how many stages belong to the base block; below 0: as in the paper.
        last_map: "stage" or "pooled"; "": the family's own.
        base_gradients: "all" students train the base block, or the "pseudo_teacher" alone (METHODS.md 1.3).

    Raises:
        UserError: a width that leaves a block without a channel; a cut that the network does not have.
    """
    shared = family.shared if shared_stages < 0 else shared_stages
    if shared >= family.stages:
        raise UserError(
            f"model.shared_stages={shared}: at least one of the {family.stages} stages must be left for "
            f"the branches"
        )
    in_branch = family.stages - shared
    compressed = no_blocks or in_branch
    if not 1 <= compressed <= in_branch:
        raise UserError(f"model.no_blocks={no_blocks} must be between 1 and {in_branch}, or 0 for all")

    def network(width: Fraction) -> Architecture:
        full = family.stages - compressed
        return family.build([Fraction(1)] * full + [width] * compressed, options)

    def named(stages: Sequence[Part]) -> list[tuple[str, Part]]:
        return [(f"stage{i}", stage) for i, stage in enumerate(stages, 1)]

    whole = network(Fraction(1))
    networks = [network(width) for width in students]
    pooled = (last_map or family.last_map) == "pooled"
    return Ensemble(
        base=Chain((("stem", whole.stem), *named(whole.stages)[:shared])),
        branches=tuple(Branch(tuple(named(n.stages)[shared:]), n.head, pooled) for n in networks),
        students=tuple(students),
        compressed=tuple(range(in_branch - compressed, in_branch)),
        base_gradients=base_gradients,
        mode=mode,
    )
