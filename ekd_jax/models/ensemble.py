"""The ensemble: students that share parts of their networks, over one tree of variables.

Variables are plain nested dicts, `{"params": tree, "batch_stats": tree}`, both trees with the
sub-trees `base`, what all students share, and `students/<i>`, what student i has of its own (i from 1;
student 1 is the pseudo teacher); where students part one after the other, `splits/<level>/<node>`
besides. A student is therefore a few path slices of each, and can be restored without the others. Put
together they are its whole network, whose stages have the same names wherever it is cut.
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

from ekd_jax.models.execution import EXECUTIONS, Branch, Maps, Network, Wide, alike, applied
from ekd_jax.models.initializers import Traced, draw, trace
from ekd_jax.models.layers import Array, Mode
from ekd_jax.models.members import Member

Variables = dict[str, Any]
Features = tuple[tuple[Array, ...], ...]
Path = tuple[str, ...]
SHARINGS = ("base", "tree", "none")


@flax.struct.dataclass
class Outputs:
    """What a forward pass gives to a method.

    Attributes:
        logits_SxBxK: every student's logits, float32.
        features: `features[b][s]`, (B, H_b, W_b, C_bs): the map of compressed block b of student s.
        pooled: of each student the map (B, H, W, C_s) that is pooled for its classifier.
        base: (B, H, W, C), what goes into the branch of student 1: the base block's output.
    """

    logits_SxBxK: Array
    features: Features
    pooled: tuple[Array, ...]
    base: Array


@dataclasses.dataclass(frozen=True)
class Student:
    """One student on its own: variables `{"params": {"stem": ..., "head": ...}, "batch_stats": same}`."""

    network: nn.Module
    mode: Mode

    def __call__(self, variables: Variables, images: Array) -> tuple[Array, Maps, Array]:
        """(B, H, W, C) float normalized -> as `Network`, in evaluation mode."""
        outputs: Any = self.network.apply(variables, images, self.mode)
        return outputs

    def logits(self, variables: Variables, images: Array) -> Array:
        """(B, H, W, C) float normalized -> (B, K) float32, in evaluation mode."""
        return self(variables, images)[0]


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Students, and which parts of their networks they share.

    Attributes:
        trunk: the shared parts, modules map -> map, with the paths of their variables.
        routes: of each student the numbers of the shared parts that its images go through, in order.
        branches: of each student what follows and is its own; equal ones are one object.
        networks: of each student the same from the images on.
        students: as they were asked for.
        widths: of each student the width multiplier of every stage.
        matched: of each student the stages whose maps are compared, their names; "pooled" is the map that
            the classifier pools.
        base_gradients: "all" students train the shared parts; the "pseudo_teacher" alone (METHODS.md 1.3);
            or the "mean" of what comes from either side of every parting (METHODS.md 12.2).
        mode: of evaluation.
        execution: how branches run, one of `execution.EXECUTIONS`; it changes nothing but time and rounding.
        wide: all branches as one network, if they can be packed.
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
    wide: Wide | None = None
    _traces: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def ways(self) -> list[str]:
        """In which its branches can run and differ."""
        equal = any(len(group) > 1 for group in alike(self.branches))
        wide = self.wide is not None and len(self.branches) > 1
        return ["separate", *(["stacked"] if equal else []), *(["packed"] if wide else [])]

    def student(self, number: int) -> Student:
        """Student `number`, from 1."""
        return Student(self.networks[number - 1], self.mode)

    def trace(self, input_shape: Sequence[int]) -> tuple[list[Traced], list[Traced]]:
        """Shared parts and branches as they see an image of `input_shape` (H, W, C); looked at once."""
        shape = tuple(input_shape)
        if shape not in self._traces:
            image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
            shared: dict[tuple[int, ...], Traced] = {}
            branches = []
            for route, branch in zip(self.routes, self.branches, strict=True):
                x: Any = image
                for depth, node in enumerate(route, 1):
                    way = route[:depth]
                    shared[way] = shared.get(way) or trace(self.trunk[node][1], x, self.mode)
                    x = shared[way].outputs
                branches.append((trace(branch, x, self.mode), x))
            self._traces[shape] = [shared[w] for w in sorted(shared, key=lambda w: w[-1])], branches
        trunk, branches = self._traces[shape]
        return trunk, [traced for traced, _ in branches]

    def shapes(self, input_shape: Sequence[int]) -> Outputs:
        """The outputs' shapes for one image."""
        self.trace(input_shape)
        _, branches = self._traces[tuple(input_shape)]
        found = [traced.outputs for traced, _ in branches]
        logits: Any = jax.ShapeDtypeStruct((len(found), *found[0][0].shape), found[0][0].dtype)
        return self._outputs(logits, found, branches[0][1])

    def init(self, seed: int | None, input_shape: Sequence[int]) -> Variables:
        """Initial variables for images of `input_shape` (H, W, C), as numpy arrays.

        With None for a seed their shapes and dtypes alone: nothing is drawn.
        """
        trunk, branches = self.trace(input_shape)
        paths = [path for path, _ in self.trunk]
        paths += [("students", str(i)) for i in range(1, len(branches) + 1)]
        variables: Variables = {kind: {"base": {}, "students": {}} for kind in ("params", "batch_stats")}
        for path, traced in zip(paths, [*trunk, *branches], strict=True):
            for kind, tree in draw(traced.variables, seed, "/".join(path)).items():
                _put(variables[kind], path, tree)
        return variables

    def paths(self, tree: Any, student: int) -> Any:
        """The sub-trees of one collection that student `student` (from 1) is, under their own paths."""
        picked: dict[str, Any] = {}
        for path in self._paths_of(student):
            _put(picked, path, _at(tree, path))
        return picked

    def alone(self, variables: Variables, student: int) -> Variables:
        """What `Student` takes, out of an ensemble's variables (or their `paths`)."""
        parts = self._paths_of(student)
        return {
            kind: {name: leaf for path in parts for name, leaf in _at(tree, path).items()}
            for kind, tree in variables.items()
            if kind in ("params", "batch_stats")
        }

    def placed(self, variables: Variables, student: int, network: Variables) -> Variables:
        """The ensemble's variables with those of one student's whole network put in their place."""
        placed = jax.tree.map(lambda leaf: leaf, variables)  # new dicts, the same leaves
        for kind, tree in network.items():
            for path in self._paths_of(student):
                _put(placed[kind], path, {name: tree[name] for name in _at(variables[kind], path)})
        return placed

    def apply(
        self,
        variables: Variables,
        images: Array | Sequence[Array],
        train: bool,
        key: Array | None = None,
    ) -> tuple[Outputs, Any]:
        """Runs the shared parts in turn, and the branches as `execution` says.

        Args:
            variables: as `init` returns them.
            images: (B, H, W, C) float, normalized; or as many views of them as there are students. Shared
                parts then see one view after the other.
            train: use the batch's statistics, update the running ones, drop out.
            key: of what is dropped in this step; networks that drop nothing need none.

        Returns:
            The outputs and the new batch statistics (the old ones unless `train`).
        """
        mode = dataclasses.replace(self.mode, train=train)
        views: list[Any] = list(images) if isinstance(images, tuple | list) else [images]
        stats = jax.tree.map(lambda leaf: leaf, variables["batch_stats"])

        def own(path: Path) -> Variables:
            return {"params": _at(variables["params"], path), "batch_stats": _at(stats, path)}

        def key_of(number: int) -> Array | None:
            return None if key is None or not train else jax.random.fold_in(key, number)

        students = len(self.branches)
        seen: dict[Any, Array] = {}  # way through the trunk -> what comes out, one object for all readers
        inputs = []
        for i, route in enumerate(self.routes):
            view = i % len(views)
            x = views[view]
            for depth, node in enumerate(route, 1):
                way = (view, *route[:depth])
                if way not in seen:
                    number = 0 if node == 0 and view == 0 else students + node * len(views) + view + 1
                    path, part = self.trunk[node]
                    x, new = applied(part, own(path), x, mode, key_of(number))
                    _put(stats, path, new)
                    if self.base_gradients == "mean":
                        x = scale_gradient(x, 1 / self._parts(route[:depth]))
                    seen[way] = x
                x = seen[way]
            if i > 0 and route and self.base_gradients == "pseudo_teacher":
                x = seen.setdefault((view, *route, "held"), lax.stop_gradient(x))
            inputs.append(x)
        branches = [
            Branch(branch, own(("students", str(i))), x, key_of(i))
            for i, (branch, x) in enumerate(zip(self.branches, inputs, strict=True), 1)
        ]
        results = EXECUTIONS[self.execution if students > 1 else "separate"](branches, mode, self.wide)
        for i, (_, new) in enumerate(results, 1):
            _put(stats, ("students", str(i)), new)
        found = [given for given, _ in results]
        logits = jnp.stack([logits for logits, _, _ in found])
        return self._outputs(logits, found, inputs[0]), stats if train else variables["batch_stats"]

    def _outputs(self, logits: Array, found: Sequence[tuple[Array, Maps, Array]], base: Array) -> Outputs:
        rows = [
            [{**maps, "pooled": pooled}[name] for name in names]
            for (_, maps, pooled), names in zip(found, self.matched, strict=True)
        ]
        features = tuple(zip(*rows, strict=True))
        return Outputs(logits, features, tuple(pooled for _, _, pooled in found), base)

    def _paths_of(self, student: int) -> list[Path]:
        shared = [self.trunk[node][0] for node in self.routes[student - 1]]
        return [*shared, ("students", str(student))]

    def _parts(self, way: tuple[int, ...]) -> int:
        """How many ways lead on from the end of a way through the trunk."""
        depth = len(way)
        own = [(i, route) for i, route in enumerate(self.routes) if route[:depth] == way]
        return len({route[depth] if len(route) > depth else -1 - i for i, route in own})


def _at(tree: Any, path: Path) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _put(tree: Any, path: Path, value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale_gradient(x: Array, factor: float) -> Array:
    """x; what comes back is multiplied by `factor`."""
    return x


scale_gradient.defvjp(lambda x, factor: (x, None), lambda factor, _, gradient: (gradient * factor,))
