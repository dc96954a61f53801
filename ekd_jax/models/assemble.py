"""The specification of an ensemble and how it is built: where networks are cut, which parts are shared."""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ekd_jax.common.errors import UserError
from ekd_jax.models.blocks import Chain
from ekd_jax.models.ensemble import Ensemble, Path
from ekd_jax.models.execution import Network, PackedNetwork
from ekd_jax.models.family import Architecture, CombinedWidth, Family, NetworkOptions
from ekd_jax.models.layers import Mode
from ekd_jax.models.members import Member

Widths = tuple[Fraction, ...]  # the width multiplier of each stage


@dataclasses.dataclass(frozen=True)
class EnsembleSpec:
    """Everything that defines an ensemble.

    Attributes:
        name: the network, a key of `models.MODELS`.
        students: as `parse_students` returns them; the first is the pseudo teacher.
        num_classes: number of classes K.
        dtype: dtype that convolutions compute in, "float32" or "bfloat16".
        sharing: "base": all students share a base block; "tree": they part one by one, as in a binary
            tree; "none": they share nothing.
        compressed_stages: how many of the branch's stages, counted from the last, get narrower with the
            width; 0 means all.
        shared_stages: number of stages in the base block; -1 means all but `own_stages`.
        own_stages: number of stages in a branch, used if `shared_stages` is -1; 0 means the family's
            default (the paper's cut).
        frozen_stages: the stem and so many stages do not learn; -1: everything learns.
        last_map: which feature map is matched last, "stage" or "pooled" (see `Family`); "" means the
            family's default.
        base_gradients: whose gradients train the shared parts, see `Ensemble`.
        batch_norm_groups: number of parts of a batch that batch norm normalizes separately.
        batch_norm_epsilon: added to the variance in batch norm.
        rematerialize: whether the backward pass keeps only each block's input and recomputes the rest.
        execution: how branches run, a key of `execution.EXECUTIONS`.
        dropout, stochastic_depth, padding: see `NetworkOptions`.
    """

    name: str
    students: tuple[Member, ...]
    num_classes: int
    dtype: str = "float32"
    sharing: str = "base"
    compressed_stages: int = 0
    shared_stages: int = -1
    own_stages: int = 0
    frozen_stages: int = -1
    last_map: str = ""
    base_gradients: str = "all"
    batch_norm_groups: int = 1
    batch_norm_epsilon: float = 1e-5
    rematerialize: bool = False
    execution: str = "separate"
    dropout: float = -1.0
    stochastic_depth: float = -1.0
    padding: str = ""

    @property
    def options(self) -> NetworkOptions:
        """The settings that a family builds its network by."""
        return NetworkOptions(self.num_classes, self.dropout, self.stochastic_depth, self.padding)

    @property
    def mode(self) -> Mode:
        """The mode in which layers compute during evaluation."""
        return Mode(
            dtype=jnp.dtype(self.dtype),
            groups=self.batch_norm_groups,
            epsilon=self.batch_norm_epsilon,
            rematerialize=self.rematerialize,
        )


def assemble(spec: EnsembleSpec, families: Sequence[Family]) -> Ensemble:
    """Build one network for each student, with the parts that they share.

    Args:
        spec: the ensemble.
        families: the family of each student's network.

    Raises:
        UserError: a width that leaves a block without channels, a cut that the network does not have, or
            an execution that these networks do not allow.
    """
    cut = _choose_cut(spec, families)
    _check_frozen(spec, families[0], cut)
    widths = [_stage_widths(spec, families, i, cut) for i in range(len(families))]
    networks = _build_networks(spec, families, widths)
    shared = _share_parts(spec, families[0], cut)
    branches = _cut_off(networks, shared.depth, spec.frozen_stages + 1)
    packed, unpackable = _pack_branches(spec, families, widths, shared.depth)
    if spec.execution == "packed" and unpackable and len(branches) > 1:
        other = "stacked" if len({id(branch) for branch in branches}) < len(branches) else "separate"
        raise UserError(f"train.execution=packed: {unpackable}: use {other}")
    return Ensemble(
        trunk=shared.parts,
        routes=shared.routes,
        branches=branches,
        networks=networks,
        students=spec.students,
        widths=tuple(widths),
        matched=_matched_maps(spec, families, branches, cut),
        base_gradients=spec.base_gradients,
        mode=spec.mode,
        execution=spec.execution,
        packed=packed,
    )


class _Cut(NamedTuple):
    """The positions at which networks are cut.

    Attributes:
        shared: number of stages in the base block.
        levels: number of times that a tree's students part; 0 if they do not form a tree.
        compressed: number of stages, counted from the last, that a single width multiplies.
    """

    shared: int
    levels: int
    compressed: int


def _choose_cut(spec: EnsembleSpec, families: Sequence[Family]) -> _Cut:
    family, number = families[0], len(families)
    if spec.sharing != "none" and any(other is not family for other in families):
        raise UserError(
            "model.students: different networks have no base block in common: pass "
            "--config.model.sharing=none, with a method that allows it"
        )
    levels = (number - 1).bit_length() if spec.sharing == "tree" else 0
    if spec.sharing == "tree" and number != 2**levels:
        raise UserError(f"model.students: a tree has 2, 4, 8, ... students, not {number}")
    shared = spec.shared_stages
    if spec.sharing == "none":
        shared = 0
    elif shared < 0 and levels:
        shared = family.stages - levels
    elif shared < 0:
        shared = family.stages - spec.own_stages if spec.own_stages else family.shared
    if not 0 <= shared < family.stages or levels > family.stages - shared:
        raise UserError(
            f"model.shared_stages={shared}: at least {max(1, levels)} of the {family.stages} stages must "
            f"be left for the branches"
        )
    in_branch = family.stages - shared
    compressed = spec.compressed_stages or in_branch
    if not 1 <= compressed <= in_branch:
        raise UserError(
            f"model.compressed_stages={spec.compressed_stages} must be between 1 and {in_branch}, or 0 for "
            f"all"
        )
    return _Cut(shared, levels, compressed)


def _check_frozen(spec: EnsembleSpec, family: Family, cut: _Cut) -> None:
    """Raise UserError unless what is frozen belongs to all students, as the weights that training starts from do."""
    asked, number = spec.frozen_stages, len(spec.students)
    if asked < 0:
        return
    if number > 1 and spec.sharing == "none":
        raise UserError(
            f"model.frozen_stages={asked}: {number} students that share nothing have no stage in common: "
            f"train one student, or pass --config.model.sharing=base with a method that allows it"
        )
    most = cut.shared if number > 1 else family.stages
    if asked > most:
        what = f"the {number} students share" if number > 1 else "the network has"
        more = "; model.shared_stages moves the cut" if number > 1 else ""
        raise UserError(
            f"model.frozen_stages={asked}: {what} a stem and {most} stages: at most {most}{more}"
        )


def _stage_widths(spec: EnsembleSpec, families: Sequence[Family], student: int, cut: _Cut) -> Widths:
    """Return the width of every stage of a student, counted from 0."""
    member, family = spec.students[student], families[student]
    if len(member.widths) == 1:
        compressed = cut.compressed if family is families[0] else family.stages
        return (Fraction(1),) * (family.stages - compressed) + member.widths * compressed
    if len(member.widths) != family.stages or any(width != 1 for width in member.widths[: cut.shared]):
        raise UserError(
            f"model.students: {member} has {len(member.widths)} widths, the network {family.stages} "
            f"stages: give one width, or one per stage (1 for each of the {cut.shared} shared)"
        )
    return member.widths


def _build_networks(
    spec: EnsembleSpec, families: Sequence[Family], widths: Sequence[Widths]
) -> tuple[Network, ...]:
    """Return each student's network; equal ones are one object."""
    keys = [(id(family), own) for family, own in zip(families, widths, strict=True)]
    built = {
        key: name_parts(family.build(key[1], spec.options))
        for key, family in dict(zip(keys, families, strict=True)).items()
    }
    return tuple(built[key] for key in keys)


class _Shared(NamedTuple):
    """The parts that students share, see `Ensemble.trunk` and `Ensemble.routes`.

    Attributes:
        depth: number of a network's parts, stem included, that come before the branch.
    """

    parts: tuple[tuple[Path, nn.Module], ...]
    routes: tuple[tuple[int, ...], ...]
    depth: int


def _share_parts(spec: EnsembleSpec, family: Family, cut: _Cut) -> _Shared:
    """Return the base block and, for a tree, the stages that some of the students share.

    Stem and `cut.shared` stages belong to all students. At each further level of a tree the next stage
    exists twice as often, each copy shared by half as many students.
    """
    number = len(spec.students)
    if spec.sharing == "none":
        return _Shared((), ((),) * number, 0)
    parts = name_parts(family.build((Fraction(1),) * family.stages, spec.options)).stages
    depth = cut.shared + 1
    trunk: list[tuple[Path, nn.Module]] = [(("base",), Chain(parts[:depth], spec.frozen_stages + 1))]
    routes: list[tuple[int, ...]] = [(0,)] * number
    for level in range(1, cut.levels):
        first, nodes = len(trunk), 2**level
        trunk += [(("splits", str(level), str(n + 1)), Chain((parts[depth],))) for n in range(nodes)]
        routes = [(*route, first + i * nodes // number) for i, route in enumerate(routes)]
        depth += 1
    return _Shared(tuple(trunk), tuple(routes), depth)


def _cut_off(networks: Sequence[Network], depth: int, frozen: int) -> tuple[Network, ...]:
    """Return the branches, which are the parts after the first `depth`; equal ones are one object.

    The first `frozen` parts of a network, counted from the stem, do not learn.
    """
    own = max(0, frozen - depth)
    branches = {id(network): Network(network.stages[depth:], network.head, own) for network in networks}
    return tuple(branches[id(network)] for network in networks)


def _pack_branches(
    spec: EnsembleSpec, families: Sequence[Family], widths: Sequence[Widths], depth: int
) -> tuple[PackedNetwork | None, str]:
    """Return all branches as one wide network, or why they cannot be one."""
    if any(family is not families[0] for family in families):
        return None, "students that are different networks are not one wide network"
    build = families[0].build
    if unpackable := build(widths[0], spec.options).unpackable:
        return None, unpackable
    built = build([CombinedWidth(of_stage) for of_stage in zip(*widths, strict=True)], spec.options)
    wide = name_parts(built)
    return PackedNetwork(Network(wide.stages[depth:], wide.head), built.first_blocks_separate), ""


def _matched_maps(
    spec: EnsembleSpec, families: Sequence[Family], branches: Sequence[Network], cut: _Cut
) -> tuple[Path, ...]:
    """Return for each student the names of the maps that are compared: those of its compressed stages."""
    has_stem = spec.sharing == "none"
    depth = min(cut.compressed, *(len(branch.stages) - has_stem for branch in branches))
    matched = []
    for family, branch in zip(families, branches, strict=True):
        names = [name for name, _ in branch.stages][-depth:]
        if (spec.last_map or family.last_map) == "pooled":
            names[-1] = "pooled"
        matched.append(tuple(names))
    return tuple(matched)


def name_parts(architecture: Architecture) -> Network:
    """Return the network with its parts named "stem", "stage1", "stage2", ... and "head"."""
    stages = [(f"stage{i}", stage) for i, stage in enumerate(architecture.stages, 1)]
    return Network((("stem", architecture.stem), *stages), architecture.head)
