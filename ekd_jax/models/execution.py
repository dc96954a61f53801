"""How the branches of an ensemble run: three ways, equal in all they give up to rounding.

separate: each branch in turn. The reference.
stacked: equal branches as one, under `jax.vmap`, their variables stacked leaf by leaf.
packed: branches of one network at several widths as one branch at the sum of the widths. Its batch norms
    are theirs side by side, its kernels block-diagonal, with theirs for blocks and zeros elsewhere:

        student 1 reads C1 channels  [ K1  0 ]       (K1 K2) where both read the same map
        student 2 reads C2 channels  [ 0  K2 ]

Variables are stored student by student whichever way they run. What is stacked or packed here is made
inside the traced function, so that autodiff gives the gradients of what is stored.
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

from ekd_jax.models.blocks import Chain, Part, Stage, call
from ekd_jax.models.initializers import Traced, trace
from ekd_jax.models.layers import Array, Mode

Maps = dict[str, Array]
Found = tuple[Array, Maps, Array]
Tree = dict[str, Any]
Flat = dict[tuple[str, ...], Any]


class Network(nn.Module):
    """Images, or a base block's map, -> logits (B, K) float32, the maps of its stages by name, (B, H_b,
    W_b, C_b) each, and the map that is pooled for the classifier."""

    stages: tuple[tuple[str, Part], ...]
    head: Part

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Found:
        maps = {}
        for name, stage in self.stages:
            x = maps[name] = call(stage(name=name), x, mode)
        logits, pooled = self.head(name="head")(x, mode)
        return logits, maps, pooled


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
    """A branch and what it runs on.

    Attributes:
        network: the same object in equal branches.
        variables: its own, `{"params": tree, "batch_stats": tree}`.
        x: (B, H, W, C); the same object in branches that read the same.
        key: of what it drops, if anything.
    """

    network: Network
    variables: Tree
    x: Array
    key: Array | None


Result = tuple[Found, Tree]  # what a branch gives, and its new batch statistics


def apply_module(module: nn.Module, variables: Tree, x: Array, mode: Mode, key: Array | None = None) -> Any:
    """What a module gives, and its new batch statistics: the old ones unless `mode.train`."""
    if not mode.train:
        return module.apply(variables, x, mode), variables.get("batch_stats", {})
    rngs = None if key is None else {"dropout": key}
    given, updated = module.apply(variables, x, mode, mutable=["batch_stats"], rngs=rngs)
    return given, updated.get("batch_stats", {})


def separate(branches: Sequence[Branch], mode: Mode, wide: PackedNetwork | None) -> list[Result]:
    """One after the other."""
    return [apply_module(b.network, b.variables, b.x, mode, b.key) for b in branches]


# --- stacked --------------------------------------------------------------------------------------


def group_equal(networks: Sequence[Network]) -> list[list[int]]:
    """The numbers of the networks, those of equal ones together."""
    groups: dict[int, list[int]] = {}
    for i, network in enumerate(networks):
        groups.setdefault(id(network), []).append(i)
    return list(groups.values())


def stacked(branches: Sequence[Branch], mode: Mode, wide: PackedNetwork | None) -> list[Result]:
    """Equal branches at once; one that no other is equal to in its turn."""
    results: dict[int, Result] = {}
    for numbers in group_equal([branch.network for branch in branches]):
        own = [branches[i] for i in numbers]
        results |= zip(
            numbers, _as_one(own, mode) if len(own) > 1 else separate(own, mode, wide), strict=True
        )
    return [results[i] for i in range(len(branches))]


def _as_one(equal: Sequence[Branch], mode: Mode) -> list[Result]:
    network, x = equal[0].network, _shared(equal)
    axis = 0 if x is None else None
    if x is None:
        x = jnp.stack([branch.x for branch in equal])

    def run(variables: Tree, x: Array, key: Array | None) -> Any:
        return apply_module(network, variables, x, mode, key)

    own = [(branch.variables, branch.key) for branch in equal]
    variables, keys = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    given = jax.vmap(run, in_axes=(0, axis, 0))(variables, x, keys)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], given) for i in range(len(equal))]


def _shared(branches: Sequence[Branch]) -> Array | None:
    """What all of them read, if it is the same."""
    return branches[0].x if all(branch.x is branches[0].x for branch in branches) else None


# --- packed ---------------------------------------------------------------------------------------


def packed(branches: Sequence[Branch], mode: Mode, wide: PackedNetwork | None) -> list[Result]:
    """As one wide network, unit by unit. Units that are not the same layers in all students, and heads, run
    apart, on their students' channels.

    Args:
        branches: of one network, at any widths.
        mode: of all.
        wide: that network at their widths together.
    """
    assert wide is not None, "`family.assemble` refuses networks that cannot be packed"
    own_S = [flatten_dict(branch.variables) for branch in branches]
    stats_S = [_flat_stats(branch.variables["batch_stats"]) for branch in branches]
    maps_S: list[Maps] = [{} for _ in branches]
    xs = [branch.x for branch in branches]  # the students' maps
    x = _shared(branches)  # the same side by side, or the one that all read; None: not put together yet
    every = [units(network) for network in (wide.network, *(branch.network for branch in branches))]
    for (path, together), *apart in zip(*every, strict=True):
        unit_S = [_below(path, own) for own in own_S]
        x = jnp.concatenate(xs, -1) if x is None else x
        may = not (wide.first_blocks_separate and path[-1] == "first")
        variables = pack(unit_S, _look(together, x, mode)) if may else None
        if variables is not None:
            x, stats = apply_module(together, unflatten_dict(variables), x, mode)
            looks = [_look(part, own_x, mode) for (_, part), own_x in zip(apart, xs, strict=True)]
            xs = _cut(x, [traced.outputs.shape[-1] for traced in looks])
            new_S = unpack(_flat_stats(stats), unit_S)
        else:
            given = [
                apply_module(part, unflatten_dict(own), own_x, mode, branch.key)
                for (_, part), own, own_x, branch in zip(apart, unit_S, xs, branches, strict=True)
            ]
            x, xs = None, [own_x for own_x, _ in given]
            new_S = [_flat_stats(stats) for _, stats in given]
        for i, new in enumerate(new_S):
            stats_S[i] |= new
            maps_S[i][path[0]] = xs[i]  # of a stage, what its last unit gives
    results = []
    for branch, own, own_x, stats, maps in zip(branches, own_S, xs, stats_S, maps_S, strict=True):
        head = branch.network.clone(stages=())
        head_own = unflatten_dict(_below(("head",), own))
        (logits, _, pooled), new = apply_module(head, head_own, own_x, mode, branch.key)
        tree = unflatten_dict(stats | _flat_stats(new)).get("batch_stats", {})
        results.append(((logits, maps, pooled), tree))
    return results


def units(network: Network) -> list[tuple[tuple[str, ...], nn.Module]]:
    """What is packed or not as a whole, with the path of its variables: the first block of a stage, the
    blocks after it, any other part. Called by names as in the network, so that they drop the same."""
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
    """The variables of a wide unit, made of those of all students; None if they are not its parts: the unit
    has other layers in some of them (a shortcut with a projection), or a width that is not scaled.

    Args:
        own_S: of every student, name -> array.
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
    """Batch statistics of a wide unit as those of every student, whose variables are `own_S`."""
    unpacked: list[Flat] = [{} for _ in own_S]
    for name, leaf in stats.items():
        for own, part in zip(unpacked, _cut(leaf, [own[name].shape[-1] for own in own_S]), strict=True):
            own[name] = part
    return unpacked


def side_by_side(leaves: Sequence[Array], shape: Sequence[int]) -> Array:
    """One array of `shape`: `leaves` along the last axis; kernels (..., I_s, O_s) as blocks of a diagonal
    if it has all their inputs, sum I_s."""
    if len(shape) > 1 and sum(leaf.shape[-2] for leaf in leaves) == shape[-2]:
        blocks, above = [], 0
        for leaf in leaves:
            below = shape[-2] - above - leaf.shape[-2]
            blocks.append(jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 2) + [(above, below), (0, 0)]))
            above += leaf.shape[-2]
        leaves = blocks
    return jnp.concatenate(leaves, -1)


def _look(module: nn.Module, x: Array, mode: Mode) -> Traced:
    return trace(module, jax.ShapeDtypeStruct(x.shape, x.dtype), dataclasses.replace(mode, train=False))


def _flat_stats(tree: Tree) -> Flat:
    flat: Flat = flatten_dict({"batch_stats": tree})
    return flat


def _below(path: tuple[str, ...], variables: Flat) -> Flat:
    """The variables of both kinds under a path."""
    return {name: leaf for name, leaf in variables.items() if name[1 : 1 + len(path)] == path}


def _cut(x: Array, sizes: Sequence[int]) -> list[Array]:
    return jnp.split(x, np.cumsum(sizes)[:-1], -1)


EXECUTIONS: dict[str, Callable[[Sequence[Branch], Mode, PackedNetwork | None], list[Result]]] = {
    "separate": separate,
    "stacked": stacked,
    "packed": packed,
}
