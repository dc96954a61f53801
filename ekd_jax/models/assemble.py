"""A family of networks, and how an ensemble is made of it.

A family knows how to build its network, stem, stages and head, with every stage at a width of its
own. Cutting it into base block and branches happens here, for all families alike.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import flax.linen as nn

from ekd_jax.common.errors import UserError
from ekd_jax.models.blocks import Chain, Part
from ekd_jax.models.ensemble import Ensemble, Path
from ekd_jax.models.execution import Network, Wide
from ekd_jax.models.layers import Mode
from ekd_jax.models.members import Member


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
    """A network: `head(stages(stem(images)))`.

    Attributes:
        stem, stages, head: its parts.
        unpackable: why branches at several widths are not one branch at the sum of the widths, with
            block-diagonal kernels (see `execution`); "": they are.
        first_apart: they are, but for the first blocks of stages.
    """

    stem: Part
    stages: Sequence[Part]
    head: Part
    unpackable: str = "the network does not say that its students can run as one wide network"
    first_apart: bool = False


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


class Together(Fraction):
    """The width of several networks side by side: the sum of theirs, and what they are."""

    parts: tuple[Fraction, ...]

    def __new__(cls, parts: Sequence[Fraction]) -> "Together":
        self = super().__new__(cls, sum(parts))
        self.parts = tuple(parts)
        return self


def scaled(channels: int, width: Fraction, multiple: int = 1) -> int:
    """channels * width, rounded down to a multiple of `multiple`; of networks together the sum of theirs.

    Raises:
        UserError: nothing is left.
    """
    if isinstance(width, Together):
        return sum(scaled(channels, own, multiple) for own in width.parts)
    left = math.floor(channels * width / multiple) * multiple
    if left == 0:
        least = multiple / channels
        raise UserError(
            f"model.students: width {float(width):g} leaves a block of {channels} channels with none; "
            f"the smallest usable width is {least:g}"
        )
    return left


def rounded(channels: Fraction | float) -> int:
    """The multiple of 8 nearest to `channels`, but never below 90 % of it: how MobileNets and
    EfficientNets scale (make_divisible of their official code)."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


def assemble(
    families: Sequence[Family],
    students: Sequence[Member],
    options: Options,
    mode: Mode,
    sharing: str = "base",
    compressed_stages: int = 0,
    shared_stages: int = -1,
    own_stages: int = 0,
    last_map: str = "",
    base_gradients: str = "all",
    execution: str = "separate",
) -> Ensemble:
    """One network for each of the students, of which they share what they have in common.

    Args:
        families: of each student.
        students: their widths; the first is the pseudo teacher.
        options: of the networks.
        mode: dtype and batch norm.
        sharing: all students have a "base" block in common; or part one by one, like a binary "tree"; or
            share "none" of their parts.
        compressed_stages: how many of the branch's stages, from the last, the multipliers change; 0: all.
        shared_stages: how many stages belong to the base block; below 0: all but `own_stages`.
        own_stages: 0: as the family has it (the paper's).
        last_map: "stage" or "pooled"; "": the family's own.
        base_gradients, execution: see `Ensemble`.

    Raises:
        UserError: a width that leaves a block without a channel; a cut that the network does not have; a
            way to run branches that these do not allow.
    """
    family, number = families[0], len(students)
    if sharing != "none" and any(f is not family for f in families):
        raise UserError(
            "model.students: different networks have no base block in common: pass "
            "--config.model.sharing=none, with a method that allows it"
        )
    levels = 0 if sharing != "tree" else (number - 1).bit_length()
    if sharing == "tree" and number != 2**levels:
        raise UserError(f"model.students: a tree has 2, 4, 8, ... students, not {number}")
    shared = shared_stages
    if shared < 0:
        shared = family.stages - own_stages if own_stages else family.shared
        shared = family.stages - levels if levels else shared
    if sharing == "none":
        shared = 0
    if not 0 <= shared < family.stages or levels > family.stages - shared:
        raise UserError(
            f"model.shared_stages={shared}: at least {max(1, levels)} of the {family.stages} stages must "
            f"be left for the branches"
        )
    in_branch = family.stages - shared
    compressed = compressed_stages or in_branch
    if not 1 <= compressed <= in_branch:
        raise UserError(
            f"model.compressed_stages={compressed_stages} must be between 1 and {in_branch}, or 0 for all"
        )

    def all_widths(family: Family, member: Member) -> tuple[Fraction, ...]:
        if len(member.widths) == 1:
            narrow = compressed if family is families[0] else family.stages
            return (Fraction(1),) * (family.stages - narrow) + member.widths * narrow
        if len(member.widths) != family.stages or any(width != 1 for width in member.widths[:shared]):
            raise UserError(
                f"model.students: {member} has {len(member.widths)} widths, the network {family.stages} "
                f"stages: give one width, or one a stage (1 for each of the {shared} shared)"
            )
        return member.widths

    whole = named(family.build((Fraction(1),) * family.stages, options)).stages
    widths = [all_widths(f, member) for f, member in zip(families, students, strict=True)]
    asked = list(zip(families, widths, strict=True))
    distinct = {(id(f), own): named(f.build(own, options)) for f, own in asked}
    networks = [distinct[id(f), own] for f, own in asked]  # of equal students one object
    # Parts of a network, its stem among them: those before `shared` + 1 are everyone's, then at each
    # level of a tree half as many students have one in common.
    trunk: list[tuple[Path, nn.Module]] = []
    routes: list[tuple[int, ...]] = [()] * number
    cut = 0
    if sharing != "none":
        trunk.append((("base",), Chain(whole[: shared + 1])))
        routes = [(0,)] * number
        cut = shared + 1
        for level in range(1, levels):
            first = len(trunk)
            trunk += [
                (("splits", str(level), str(node + 1)), Chain((whole[cut],))) for node in range(2**level)
            ]
            routes = [(*route, first + i * 2**level // number) for i, route in enumerate(routes)]
            cut += 1
    cut_off = {id(n): Network(n.stages[cut:], n.head) for n in networks}
    branches = tuple(cut_off[id(n)] for n in networks)
    wide, unpackable = _side_by_side(families, widths, options, cut)
    if execution == "packed" and unpackable and number > 1:
        nearest = "stacked" if len(cut_off) < number else "separate"
        raise UserError(f"train.execution=packed: {unpackable}: use {nearest}")
    depth = min(compressed, *(len(b.stages) - (sharing == "none") for b in branches))
    matched = []
    for f, branch in zip(families, branches, strict=True):
        names = [name for name, _ in branch.stages][-depth:]
        pooled = (last_map or f.last_map) == "pooled"
        matched.append((*names[:-1], "pooled" if pooled else names[-1]))
    return Ensemble(
        trunk=tuple(trunk),
        routes=tuple(routes),
        branches=branches,
        networks=tuple(networks),
        students=tuple(students),
        widths=tuple(widths),
        matched=tuple(matched),
        base_gradients=base_gradients,
        mode=mode,
        execution=execution,
        wide=wide,
    )


def named(built: Architecture) -> Network:
    """The network, its parts named as they are everywhere."""
    stages = [(f"stage{i}", stage) for i, stage in enumerate(built.stages, 1)]
    return Network((("stem", built.stem), *stages), built.head)


def _side_by_side(
    families: Sequence[Family], widths: Sequence[Sequence[Fraction]], options: Options, cut: int
) -> tuple[Wide | None, str]:
    """All students' branches as one network, or why they are not."""
    if any(family is not families[0] for family in families):
        return None, "students that are different networks are not one wide network"
    build = families[0].build
    if unpackable := build(widths[0], options).unpackable:
        return None, unpackable
    built = build([Together(of_stage) for of_stage in zip(*widths, strict=True)], options)
    network = named(built)
    return Wide(Network(network.stages[cut:], network.head), built.first_apart), ""
