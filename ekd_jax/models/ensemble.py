"""The ensemble: one base block and S branches, each a student, over one tree of variables.

Variables are plain nested dicts, `{"params": tree, "batch_stats": tree}`, both trees with the
sub-trees `base` and `students/<i>` (i from 1; student 1 is the pseudo teacher). A student is
therefore two path slices of each, and can be restored without the others.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.errors import UserError
from ekd_jax.models.blocks import Part
from ekd_jax.models.layers import Array, Mode, Traced, draw, trace

Variables = dict[str, Any]
Features = tuple[tuple[Array, ...], ...]


@flax.struct.dataclass
class Outputs:
    """What a forward pass gives to a method.

    Attributes:
        logits_SxBxK: every student's logits, float32.
        features: `features[b][s]`, (B, H_b, W_b, C_bs): the map of compressed block b of student s.
        base: (B, H, W, C), the base block's output.
    """

    logits_SxBxK: Array
    features: Features
    base: Array


class Branch(nn.Module):
    """Base map -> logits (B, K) float32 and the maps of its stages, (B, H_b, W_b, C_b) each.

    Attributes:
        stages: with their names.
        head: the classifier.
        pooled: the last map is the one that the head pools, instead of the last stage's.
    """

    stages: tuple[tuple[str, Part], ...]
    head: Part
    pooled: bool = False

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> tuple[Array, tuple[Array, ...]]:
        maps = []
        for name, stage in self.stages:
            x = stage(name=name)(x, mode)
            maps.append(x)
        logits, last = self.head(name="head")(x, mode)
        return logits, (*maps[:-1], last if self.pooled else x)


@dataclasses.dataclass(frozen=True)
class Student:
    """One student on its own: variables `{"params": {"base", "branch"}, "batch_stats": same}`."""

    base: nn.Module
    branch: nn.Module
    mode: Mode

    def logits(self, variables: Variables, images: Array) -> Array:
        """(B, H, W, C) float normalised -> (B, K) float32, in evaluation mode."""
        base, branch = ({k: tree[part] for k, tree in variables.items()} for part in ("base", "branch"))
        z: Array = self.branch.apply(branch, self.base.apply(base, images, self.mode), self.mode)[0]
        return z


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """A network cut into base block and branches.

    Attributes:
        base: module, images -> map.
        branches: modules, map -> (logits (B, K), maps of its stages).
        students: width multipliers, one a branch.
        compressed: indices of the stages whose width the multipliers change.
        base_gradients: "all" students train the base block, or the "pseudo_teacher" alone (METHODS.md 1.3).
        mode: of evaluation.
    """

    base: nn.Module
    branches: tuple[nn.Module, ...]
    students: tuple[Fraction, ...]
    compressed: tuple[int, ...]
    base_gradients: str
    mode: Mode
    _traces: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def student(self, number: int) -> Student:
        """Student `number`, from 1."""
        return Student(self.base, self.branches[number - 1], self.mode)

    def trace(self, input_shape: Sequence[int]) -> tuple[Traced, list[Traced]]:
        """Base block and branches as they see an image of `input_shape` (H, W, C); looked at once."""
        shape = tuple(input_shape)
        if shape not in self._traces:
            image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
            base = trace(self.base, image, self.mode)
            self._traces[shape] = base, [trace(branch, base.outputs, self.mode) for branch in self.branches]
        return self._traces[shape]

    def shapes(self, input_shape: Sequence[int]) -> Outputs:
        """The outputs' shapes for one image."""
        base, branches = self.trace(input_shape)
        (logits, _), maps = branches[0].outputs, [branch.outputs[1] for branch in branches]
        together: Any = jax.ShapeDtypeStruct((len(branches), *logits.shape), logits.dtype)
        return Outputs(
            together,
            tuple(tuple(m[b] for m in maps) for b in self.compressed),
            base.outputs,
        )

    def init(self, seed: int | None, input_shape: Sequence[int]) -> Variables:
        """Initial variables for images of `input_shape` (H, W, C), as numpy arrays.

        With None for a seed their shapes and dtypes alone: nothing is drawn.
        """
        base_trace, traces = self.trace(input_shape)
        base = draw(base_trace.variables, seed, "base")
        students = {
            str(i): draw(branch.variables, seed, f"students/{i}") for i, branch in enumerate(traces, 1)
        }
        return {
            kind: {"base": base.get(kind, {}), "students": {i: s[kind] for i, s in students.items()}}
            for kind in ("params", "batch_stats")
        }

    def apply(
        self, variables: Variables, images: Array, train: bool, key: Array | None = None
    ) -> tuple[Outputs, Any]:
        """Runs base block and branches, each branch in turn.

        Args:
            variables: as `init` returns them.
            images: (B, H, W, C) float, normalised.
            train: use the batch's statistics, update the running ones, drop out.
            key: of what is dropped in this step; networks that drop nothing need none.

        Returns:
            The outputs and the new batch statistics (the old ones unless `train`).
        """
        mode = dataclasses.replace(self.mode, train=train)

        def call(module: nn.Module, path: tuple[str, ...], x: Array, number: int) -> tuple[Any, Any]:
            own = {kind: _at(tree, path) for kind, tree in variables.items()}
            if not train:
                return module.apply(own, x, mode), own["batch_stats"]
            rngs = None if key is None else {"drop": jax.random.fold_in(key, number)}
            out, updated = module.apply(own, x, mode, mutable=["batch_stats"], rngs=rngs)
            return out, updated.get("batch_stats", {})

        base, base_stats = call(self.base, ("base",), images, 0)
        logits, maps, stats = [], [], {}
        for i, branch in enumerate(self.branches, 1):
            blocked = i > 1 and self.base_gradients == "pseudo_teacher"
            x = lax.stop_gradient(base) if blocked else base
            (z, m), stats[str(i)] = call(branch, ("students", str(i)), x, i)
            logits.append(z)
            maps.append(m)
        features = tuple(tuple(m[b] for m in maps) for b in self.compressed)
        return Outputs(jnp.stack(logits), features, base), {"base": base_stats, "students": stats}


def student_paths(tree: Any, student: int) -> Any:
    """The two sub-trees of one collection that student `student` (from 1) is: base and branch."""
    return {"base": tree["base"], "students": {str(student): tree["students"][str(student)]}}


def student_variables(variables: Variables, student: int) -> Variables:
    """What `Student` takes, out of an ensemble's variables (or their `student_paths`)."""
    return {
        kind: {"base": tree["base"], "branch": tree["students"][str(student)]}
        for kind, tree in variables.items()
    }


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def parse_students(value: Any) -> tuple[Fraction, ...]:
    """Width multipliers from `model.students`: a number S gives 1, (S-1)/S, ..., 1/S.

    Raises:
        UserError: not a positive number of students or a list of positive widths.
    """
    problem = f"model.students={value!r} must be a number (5) or a tuple of width multipliers (1, 0.5)"
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise UserError(f"{problem}, at least one")
        return tuple(Fraction(value - j, value) for j in range(value))
    if not isinstance(value, list | tuple) or not value:
        raise UserError(problem)
    try:
        widths = tuple(Fraction(str(w)) for w in value)  # by its decimal digits: 0.7 * 10 is 7
    except ValueError:
        raise UserError(problem) from None
    if min(widths) <= 0:
        raise UserError(f"{problem}, each above 0")
    return widths
