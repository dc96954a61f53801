"""The ensemble: students that share parts of their networks, over one tree of variables.

Variables are plain nested dicts, `{"params": tree, "batch_stats": tree}`. Both trees have the sub-trees
`base`, which all students share, and `students/<i>`, the branch of student i (counted from 1; student 1 is
the pseudo teacher). Where students part one by one there are also `splits/<level>/<node>`. A student is
therefore a few path slices of each tree and can be restored without the others. Merged, its slices are its
whole network, whose parts have the same names wherever the network is cut.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.common.errors import UserError
from ekd_jax.models.cost import Cost, count_cost
from ekd_jax.models.execution import (
    EXECUTIONS,
    Branch,
    Network,
    NetworkOutputs,
    PackedNetwork,
    apply_module,
    group_equal,
)
from ekd_jax.models.initializers import Traced, trace
from ekd_jax.models.layers import Array, Mode
from ekd_jax.models.members import Member

Variables = dict[str, Any]
Features = tuple[tuple[Array, ...], ...]
Path = tuple[str, ...]
KINDS = ("params", "batch_stats")  # the collections of variables that are kept
SHARINGS = ("base", "tree", "none")


@flax.struct.dataclass
class Outputs:
    """The outputs of a forward pass, with which a method is called.

    Attributes:
        logits_SxBxK: every student's logits, float32.
        features: `features[b][s]`, (B, H_b, W_b, C_bs), is the map of compressed block b of student s.
        pooled: for each student the map (B, H, W, C_s) that is pooled for its classifier.
        base: (B, H, W, C), the base block's output, which the branch of student 1 reads.
    """

    logits_SxBxK: Array
    features: Features
    pooled: tuple[Array, ...]
    base: Array


@dataclasses.dataclass(frozen=True)
class Student:
    """One student as a network of its own.

    Its variables are `{"params": {"stem": ..., "head": ...}, "batch_stats": ...}`, both trees alike.
    """

    network: nn.Module
    mode: Mode

    def __call__(self, variables: Variables, images: Array) -> NetworkOutputs:
        """Run the network on images (B, H, W, C), normalized floats, in evaluation mode."""
        outputs: Any = self.network.apply(variables, images, self.mode)
        return NetworkOutputs(*outputs)

    def logits(self, variables: Variables, images: Array) -> Array:
        """Return logits (B, K) float32 of images (B, H, W, C), normalized floats, in evaluation mode."""
        return self(variables, images).logits


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Students, and which parts of their networks they share.

    Attributes:
        trunk: the shared parts, modules from map to map, with the paths of their variables.
        routes: for each student the numbers of the shared parts that its images pass, in order.
        branches: for each student the network that follows and belongs to it; equal ones are one object.
        networks: for each student its whole network, from the images on.
        students: the students as they were asked for.
        widths: for each student the width multiplier of every stage.
        matched: for each student the names of the stages whose maps are compared; "pooled" is the map
            that the classifier pools.
        base_gradients: who trains the shared parts: "all" students, the "pseudo_teacher" alone
            (docs/reference/oem.md#base-gradients), or "all" with the gradients of the ways on from each
            shared part averaged instead of summed, the "mean" (docs/reference/cl_ilr.md).
        mode: how layers compute in evaluation.
        execution: how branches run, a key of `execution.EXECUTIONS`; it changes only time and rounding.
        packed: all branches as one wide network, if they can be packed.
    """

    trunk: tuple[tuple[Path, nn.Module], ...]
    routes: tuple[tuple[int, ...], ...]
    branches: tuple[Network, ...]
    networks: tuple[Network, ...]
    students: tuple[Member, ...]
    widths: tuple[tuple[Fraction, ...], ...]
    matched: tuple[Path, ...]
    base_gradients: str
    mode: Mode
    execution: str = "separate"
    packed: PackedNetwork | None = None

    @property
    def executions(self) -> list[str]:
        """The ways to run the branches that differ for this ensemble."""
        equal = any(len(group) > 1 for group in group_equal(self.branches))
        packable = self.packed is not None and len(self.branches) > 1
        return ["separate", *(["stacked"] if equal else []), *(["packed"] if packable else [])]

    def student(self, number: int) -> Student:
        """Return student `number`, counted from 1."""
        return Student(self.networks[number - 1], self.mode)

    def trace(self, input_shape: Sequence[int]) -> "EnsembleTrace":
        """Trace all networks on one image of `input_shape` (H, W, C). Nothing is computed or compiled.

        Raises:
            UserError: a network keeps variables other than parameters and batch statistics.
        """
        image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
        shared: dict[tuple[int, ...], Traced] = {}
        branches: list[Traced] = []
        seen: dict[tuple[int, tuple[int, ...]], Traced] = {}  # equal branches that read the same map
        for route, branch in zip(self.routes, self.branches, strict=True):
            x: Any = image
            for depth, node in enumerate(route, 1):
                way = route[:depth]
                if way not in shared:
                    shared[way] = trace(self.trunk[node][1], x, self.mode)
                x = shared[way].outputs
            key = id(branch), route
            if key not in seen:
                seen[key] = trace(branch, x, self.mode)
            branches.append(seen[key])
        trunk = [shared[way] for way in sorted(shared, key=lambda way: way[-1])]
        for traced in (*trunk, *seen.values()):
            _check_kinds(traced)
        of_branches = [traced.outputs for traced in branches]
        one = of_branches[0].logits
        logits: Any = jax.ShapeDtypeStruct((len(branches), *one.shape), one.dtype)
        base: Any = shared[self.routes[0]].outputs if self.routes[0] else image
        outputs = self._outputs(logits, of_branches, base)
        return EnsembleTrace(self, tuple(input_shape), tuple(trunk), tuple(branches), outputs)

    def student_subtrees(self, tree: Any, student: int) -> Any:
        """Return the parts of one collection that student `student` (from 1) uses, under their paths."""
        picked: dict[str, Any] = {}
        for path in self._paths_of(student):
            _put(picked, path, _at(tree, path))
        return picked

    def student_variables(self, variables: Variables, student: int) -> Variables:
        """Return the variables of `Student` number `student` from an ensemble's (or their subtrees)."""
        paths = self._paths_of(student)
        return {
            kind: {name: leaf for path in paths for name, leaf in _at(tree, path).items()}
            for kind, tree in variables.items()
            if kind in KINDS
        }

    def with_student_variables(self, variables: Variables, student: int, own: Variables) -> Variables:
        """Return an ensemble's variables with those of one student's whole network replaced by `own`."""
        replaced = jax.tree.map(lambda leaf: leaf, variables)  # new dicts, the same leaves
        for kind, tree in own.items():
            for path in self._paths_of(student):
                _put(replaced[kind], path, {name: tree[name] for name in _at(variables[kind], path)})
        return replaced

    def apply(
        self,
        variables: Variables,
        images: Array | Sequence[Array],
        train: bool,
        key: Array | None = None,
    ) -> tuple[Outputs, Any]:
        """Run the shared parts in turn, and the branches in the way that `execution` names.

        Args:
            variables: as `EnsembleTrace.init` returns them.
            images: (B, H, W, C) normalized floats, or one such view of them for each student. Shared
                parts then process one view after the other.
            train: whether batch norm uses the batch's statistics and updates the running ones, and
                whether dropout drops.
            key: key for dropout. Networks that drop nothing need none.

        Returns:
            The outputs, and the new batch statistics (the old ones unless `train`).
        """
        mode = dataclasses.replace(self.mode, train=train)
        views: list[Any] = list(images) if isinstance(images, tuple | list) else [images]
        params, old = variables["params"], variables["batch_stats"]
        stats = jax.tree.map(lambda leaf: leaf, old)  # new dicts, the same leaves
        key = key if train else None
        inputs = self._run_trunk(params, stats, views, mode, key)
        branches = [
            Branch(branch, _part_variables(params, stats, ("students", str(i))), x, _fold_in(key, i))
            for i, (branch, x) in enumerate(zip(self.branches, inputs, strict=True), 1)
        ]
        execute = EXECUTIONS[self.execution if len(branches) > 1 else "separate"]
        results = execute(branches, mode, self.packed)
        for i, (_, new) in enumerate(results, 1):
            _put(stats, ("students", str(i)), new)
        outputs = [of_branch for of_branch, _ in results]
        logits = jnp.stack([of_branch.logits for of_branch in outputs])
        return self._outputs(logits, outputs, inputs[0]), stats if train else old

    def _run_trunk(
        self, params: Any, stats: Any, views: Sequence[Array], mode: Mode, key: Array | None
    ) -> list[Array]:
        """Return the map that each branch reads, and put the new batch statistics into `stats`.

        Branches that read the same map get the same object.
        """
        students = len(self.branches)
        seen: dict[Any, Array] = {}  # way through the trunk -> its map
        inputs = []
        for i, route in enumerate(self.routes):
            view = i % len(views)
            x = views[view]
            for depth, node in enumerate(route, 1):
                way = (view, *route[:depth])
                if way not in seen:
                    # Numbers 1 to S are those of the branches.
                    number = 0 if node == 0 and view == 0 else students + node * len(views) + view + 1
                    path, part = self.trunk[node]
                    own = _part_variables(params, stats, path)
                    x, new = apply_module(part, own, x, mode, _fold_in(key, number))
                    _put(stats, path, new)
                    if self.base_gradients == "mean":
                        x = scale_gradient(x, 1 / self._ways_on(route[:depth]))
                    seen[way] = x
                x = seen[way]
            if i > 0 and route and self.base_gradients == "pseudo_teacher":
                x = seen.setdefault((view, *route, "stopped"), lax.stop_gradient(x))
            inputs.append(x)
        return inputs

    def _outputs(self, logits: Array, branches: Sequence[NetworkOutputs], base: Array) -> Outputs:
        rows = [
            [{**branch.maps, "pooled": branch.pooled}[name] for name in names]
            for branch, names in zip(branches, self.matched, strict=True)
        ]
        features = tuple(zip(*rows, strict=True))
        return Outputs(logits, features, tuple(branch.pooled for branch in branches), base)

    def _paths_of(self, student: int) -> list[Path]:
        """Return the paths of a student's variables, counted from 1."""
        shared = [self.trunk[node][0] for node in self.routes[student - 1]]
        return [*shared, ("students", str(student))]

    def _ways_on(self, way: tuple[int, ...]) -> int:
        """Return how many ways lead on from the end of a way through the trunk."""
        depth = len(way)
        own = [(i, route) for i, route in enumerate(self.routes) if route[:depth] == way]
        return len({route[depth] if len(route) > depth else -1 - i for i, route in own})


@dataclasses.dataclass(frozen=True, eq=False)
class EnsembleTrace:
    """An ensemble for images of one shape: shapes, initial values and costs, with nothing compiled.

    Attributes:
        ensemble: the networks.
        input_shape: height, width and channels of the images.
        trunk, branches: the ensemble's shared parts and branches, traced on one image.
        outputs: shapes and dtypes of the outputs for one image.
    """

    ensemble: Ensemble
    input_shape: tuple[int, ...]
    trunk: tuple[Traced, ...]
    branches: tuple[Traced, ...]
    outputs: Outputs

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return int(self.outputs.logits_SxBxK.shape[-1])

    def init(self, seed: int | None) -> Variables:
        """Return initial variables as numpy arrays; with None for a seed their shapes and dtypes."""
        paths = [path for path, _ in self.ensemble.trunk]
        paths += [("students", str(i)) for i in range(1, len(self.branches) + 1)]
        variables: Variables = {kind: {"base": {}, "students": {}} for kind in KINDS}
        for path, traced in zip(paths, (*self.trunk, *self.branches), strict=True):
            own = traced.init(seed, "/".join(path))
            for kind in KINDS:
                _put(variables[kind], path, own.get(kind, {}))
        return variables

    def cost(self, student: int) -> Cost:
        """Return the cost of one image in the network of a student, counted from 1."""
        shared = [self.trunk[node] for node in self.ensemble.routes[student - 1]]
        return sum((count_cost(part.jaxpr) for part in [*shared, self.branches[student - 1]]), Cost())

    def total_cost(self) -> Cost:
        """Return the cost of one image in all networks, shared parts counted once."""
        return sum((count_cost(part.jaxpr) for part in [*self.trunk, *self.branches]), Cost())


def _check_kinds(traced: Traced) -> None:
    other = [kind for kind in traced.variables if kind not in KINDS]
    if other:
        raise UserError(
            f"a network has variables of the kind {other[0]!r}: only {' and '.join(KINDS)} are kept; take "
            f"layers without others"
        )


def _at(tree: Any, path: Path) -> Any:
    """Return a sub-tree; an empty one if there is none, as a part may have no batch norm."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def _part_variables(params: Any, stats: Any, path: Path) -> Variables:
    return {"params": _at(params, path), "batch_stats": _at(stats, path)}


def _fold_in(key: Array | None, number: int) -> Array | None:
    return None if key is None else jax.random.fold_in(key, number)


def _put(tree: Any, path: Path, value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale_gradient(x: Array, factor: float) -> Array:
    """Return x; its gradient is multiplied by `factor`."""
    return x


scale_gradient.defvjp(lambda x, factor: (x, None), lambda factor, _, gradient: (gradient * factor,))
