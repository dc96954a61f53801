"""Three ways to run the branches of an ensemble, equal up to rounding.

separate: each branch in turn. This is the reference.
stacked: equal branches as one under `jax.vmap`, their variables stacked leaf by leaf.
packed: branches of one network at several widths as one branch at the sum of the widths. Batch norms lie
    side by side. Kernels are block-diagonal, the students' kernels being the blocks, with zeros elsewhere:

        student 1 reads C1 channels  [ K1  0 ]       or (K1 K2), if both read the same map
        student 2 reads C2 channels  [ 0  K2 ]

Variables are always stored student by student. They are stacked or packed inside the traced function, so that
autodiff gives gradients of the stored variables.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ekd_jax.models.blocks import Chain, Part, Stage, in_evaluation, run_part
from ekd_jax.models.initializers import Traced, trace
from ekd_jax.models.layers import Array, Mode

Maps = dict[str, Array]
Tree = dict[str, Any]
Flat = dict[tuple[str, ...], Any]


class NetworkOutputs(NamedTuple):
    """The outputs of a network or a branch.

    Attributes:
        logits: (B, K) float32.
        maps: the outputs (B, H_b, W_b, C_b) of its stages by name.
        pooled: the map (B, H, W, C) that is pooled for the classifier.
    """

    logits: Array
    maps: Maps
    pooled: Array


class Network(nn.Module):
    """Named stages and a head, from images or a base block's map to `NetworkOutputs`.

    The first `frozen` stages always run in evaluation mode.
    """

    stages: tuple[tuple[str, Part], ...]
    head: Part
    frozen: int = 0

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> NetworkOutputs:
        maps = {}
        for i, (name, stage) in enumerate(self.stages):
            own = mode if i >= self.frozen else in_evaluation(mode)
            x = maps[name] = run_part(stage(name=name), x, own)
        logits, pooled = self.head(name="head")(x, mode)
        return NetworkOutputs(logits, maps, pooled)


class PackedNetwork(NamedTuple):
    """The one wide network that packed branches run as.

    Attributes:
        network: a network whose stages have the channels of all students.
        first_blocks_separate: whether the first block of a stage cannot be packed, because it computes
            something else in the wide network.
    """

    network: Network
    first_blocks_separate: bool = False


class Branch(NamedTuple):
    """A branch, its variables and its input.

    Attributes:
        network: the same object in equal branches.
        variables: its own variables, `{"params": tree, "batch_stats": tree}`.
        x: (B, H, W, C); the same object in branches that read the same map.
        key: key for dropout, if anything is dropped.
    """

    network: Network
    variables: Tree
    x: Array
    key: Array | None


Result = tuple[NetworkOutputs, Tree]  # a branch's outputs and its new batch statistics
Execution = Callable[[Sequence[Branch], Mode, PackedNetwork | None], list[Result]]


def apply_module(module: nn.Module, variables: Tree, x: Array, mode: Mode, key: Array | None = None) -> Any:
    """Return a module's outputs and its new batch statistics, which are the old ones unless `mode.train`."""
    if not mode.train:
        return module.apply(variables, x, mode), variables.get("batch_stats", {})
    rngs = None if key is None else {"dropout": key}
    outputs, updated = module.apply(variables, x, mode, mutable=["batch_stats"], rngs=rngs)
    return outputs, updated.get("batch_stats", {})


def separate(branches: Sequence[Branch], mode: Mode, wide: PackedNetwork | None) -> list[Result]:
    """Run the branches one after the other."""
    return [apply_module(b.network, b.variables, b.x, mode, b.key) for b in branches]


# --- stacked --------------------------------------------------------------------------------------


def group_equal(networks: Sequence[Network]) -> list[list[int]]:
    """Return the positions of the networks, grouped so that those in a group are equal."""
    groups: dict[int, list[int]] = {}
    for i, network in enumerate(networks):
        groups.setdefault(id(network), []).append(i)
    return list(groups.values())


def stacked(branches: Sequence[Branch], mode: Mode, wide: PackedNetwork | None) -> list[Result]:
    """Run each group of equal branches at once, one group after the other."""
    results: dict[int, Result] = {}
    for positions in group_equal([branch.network for branch in branches]):
        group = [branches[i] for i in positions]
        found = _run_stacked(group, mode) if len(group) > 1 else separate(group, mode, wide)
        results |= zip(positions, found, strict=True)
    return [results[i] for i in range(len(branches))]


def _run_stacked(equal: Sequence[Branch], mode: Mode) -> list[Result]:
    network, x = equal[0].network, _common_input(equal)
    axis = 0 if x is None else None
    if x is None:
        x = jnp.stack([branch.x for branch in equal])

    def run(variables: Tree, x: Array, key: Array | None) -> Any:
        return apply_module(network, variables, x, mode, key)

    own = [(branch.variables, branch.key) for branch in equal]
    variables, keys = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    outputs = jax.vmap(run, in_axes=(0, axis, 0))(variables, x, keys)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], outputs) for i in range(len(equal))]


def _common_input(branches: Sequence[Branch]) -> Array | None:
    """Return the map that all branches read, or None if they read different ones."""
    return branches[0].x if all(branch.x is branches[0].x for branch in branches) else None


# --- packed ---------------------------------------------------------------------------------------


def packed(branches: Sequence[Branch], mode: Mode, wide: PackedNetwork | None) -> list[Result]:
    """Run the branches as one wide network, unit by unit.

    Units that do not have the same layers in all students, and heads, run separately, each student on its
    own channels.

    Args:
        branches: branches of one network, at any widths.
        mode: how layers compute.
        wide: that network at the combined width.
    """
    assert wide is not None, "`assemble` refuses networks that cannot be packed"
    own_S = [flatten_dict(branch.variables) for branch in branches]
    stats_S = [_flat_stats(branch.variables["batch_stats"]) for branch in branches]
    maps_S: list[Maps] = [{} for _ in branches]
    x_S = [branch.x for branch in branches]
    # The students' maps side by side, or the one map that all of them read. None: to be concatenated.
    x = _common_input(branches)
    all_units = [units(network) for network in (wide.network, *(branch.network for branch in branches))]
    for (path, wide_unit), *own_units in zip(*all_units, strict=True):
        unit_S = [_below(path, own) for own in own_S]
        x = jnp.concatenate(x_S, -1) if x is None else x
        packable = not (wide.first_blocks_separate and path[-1] == "first")
        variables = pack(unit_S, _trace_unit(wide_unit, x, mode)) if packable else None
        if variables is not None:
            x, stats = apply_module(wide_unit, unflatten_dict(variables), x, mode)
            traced_S = [
                _trace_unit(unit, own_x, mode) for (_, unit), own_x in zip(own_units, x_S, strict=True)
            ]
            x_S = _split(x, [traced.outputs.shape[-1] for traced in traced_S])
            new_S = unpack(_flat_stats(stats), unit_S)
        else:
            results = [
                apply_module(unit, unflatten_dict(own), own_x, mode, branch.key)
                for (_, unit), own, own_x, branch in zip(own_units, unit_S, x_S, branches, strict=True)
            ]
            x, x_S = None, [own_x for own_x, _ in results]
            new_S = [_flat_stats(stats) for _, stats in results]
        for i, new in enumerate(new_S):
            stats_S[i] |= new
            maps_S[i][path[0]] = x_S[i]  # a stage's map is the output of its last unit
    return [
        _run_head(branch, x, mode, maps, stats)
        for branch, x, maps, stats in zip(branches, x_S, maps_S, stats_S, strict=True)
    ]


def _run_head(branch: Branch, x: Array, mode: Mode, maps: Maps, stats: Flat) -> Result:
    """Run the head of a branch and add its outputs and statistics to those of its stages."""
    head = branch.network.clone(stages=())
    variables = unflatten_dict(_below(("head",), flatten_dict(branch.variables)))
    (logits, _, pooled), new = apply_module(head, variables, x, mode, branch.key)
    tree = unflatten_dict(stats | _flat_stats(new)).get("batch_stats", {})
    return NetworkOutputs(logits, maps, pooled), tree


def units(network: Network) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Return the units of a network, each with the path of its variables.

    A unit is packed as a whole or not at all: the first block of a stage, the blocks after it, or any other
    part. Units call their parts by the names in the network, so that they drop the same.
    """
    found: list[tuple[tuple[str, ...], nn.Module]] = []
    for name, part in network.stages:
        stage = part()
        if isinstance(stage, Stage):
            for piece in ("first", "rest") if stage.blocks > 1 else ("first",):
                found.append(((name, piece), Chain(((name, partial(part, parts=(piece,))),))))
        else:
            found.append(((name,), Chain(((name, part),))))
    return found


def pack(own_S: Sequence[Flat], wide: Traced) -> Flat | None:
    """Return the variables of a wide unit, made of those of all students, or None if that is impossible.

    It is impossible if the unit has other layers in some students (a shortcut with a projection), or if its
    width is not the sum of theirs.

    Args:
        own_S: for every student, name -> array.
        wide: the wide unit.
    """
    shapes = {name: leaf.shape for name, leaf in flatten_dict(wide.init(None, "")).items()}
    if any(own.keys() != shapes.keys() for own in own_S):
        return None
    leaves_S = {name: [own[name] for own in own_S] for name in shapes}
    if any(sum(leaf.shape[-1] for leaf in leaves_S[name]) != shape[-1] for name, shape in shapes.items()):
        return None
    return {name: side_by_side(leaves_S[name], shape) for name, shape in shapes.items()}


def unpack(stats: Flat, own_S: Sequence[Flat]) -> list[Flat]:
    """Split the batch statistics of a wide unit into those of every student, whose variables are `own_S`."""
    unpacked: list[Flat] = [{} for _ in own_S]
    for name, leaf in stats.items():
        parts = _split(leaf, [own[name].shape[-1] for own in own_S])
        for own, part in zip(unpacked, parts, strict=True):
            own[name] = part
    return unpacked


def side_by_side(leaves: Sequence[Array], shape: Sequence[int]) -> Array:
    """Return one array of `shape`: `leaves` along the last axis.

    Kernels (..., I_s, O_s) become the blocks of a diagonal if `shape` has all their inputs, sum I_s.
    """
    if len(shape) > 1 and sum(leaf.shape[-2] for leaf in leaves) == shape[-2]:
        blocks, above = [], 0
        for leaf in leaves:
            below = shape[-2] - above - leaf.shape[-2]
            blocks.append(jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 2) + [(above, below), (0, 0)]))
            above += leaf.shape[-2]
        leaves = blocks
    return jnp.concatenate(leaves, -1)


def _trace_unit(module: nn.Module, x: Array, mode: Mode) -> Traced:
    return trace(module, jax.ShapeDtypeStruct(x.shape, x.dtype), dataclasses.replace(mode, train=False))


def _flat_stats(tree: Tree) -> Flat:
    flat: Flat = flatten_dict({"batch_stats": tree})
    return flat


def _below(path: tuple[str, ...], variables: Flat) -> Flat:
    """Return the variables of all kinds below a path."""
    return {name: leaf for name, leaf in variables.items() if name[1 : 1 + len(path)] == path}


def _split(x: Array, sizes: Sequence[int]) -> list[Array]:
    """Split x along the last axis into parts of these sizes."""
    return jnp.split(x, np.cumsum(sizes)[:-1], -1)


EXECUTIONS: dict[str, Execution] = {"separate": separate, "stacked": stacked, "packed": packed}
