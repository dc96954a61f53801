"""The arrays of a PyTorch network by name: state dicts as a student's variables, and the other way round."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ekd_jax.models.ensemble import Variables
from ekd_jax.students.torch_names import Rules, torch_name

Arrays = Mapping[str, Any]  # a state_dict(): names to anything that numpy.asarray takes
PROBLEMS_SHOWN = 3  # how many names of each kind of problem an error shows; the others are counted
_TO_JAX = {4: (2, 3, 1, 0), 2: (1, 0)}  # OIHW -> HWIO, (out, in) -> (in, out)
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_COUNTERS = re.compile(r"(?:.*\.)?(?:num_batches_tracked|total_ops|total_params)")  # of PyTorch and of thop
_AUXILIARY = re.compile(r"aux\w*\..*", re.IGNORECASE)  # heads that are used in training alone


@dataclasses.dataclass
class Match:
    """The values that a network's variables got from a state dict, and what did not fit.

    Attributes:
        variables: a tree of numpy arrays, zeros where an array does not fit.
        matched: number of arrays that fit.
        missing: names that the state dict lacks.
        misshapen: for each array of another shape its name and both shapes.
        unusable: for each array of integers or with NaN its name and what is wrong.
        left: names that have no place in the network.
        auxiliary: names of auxiliary heads, which are left out on purpose.
    """

    variables: Variables = dataclasses.field(default_factory=dict)
    matched: int = 0
    missing: list[str] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)
    unusable: list[str] = dataclasses.field(default_factory=list)
    left: list[str] = dataclasses.field(default_factory=list)
    auxiliary: list[str] = dataclasses.field(default_factory=list)

    @property
    def problems(self) -> int:
        """Number of names that do not fit."""
        return sum(map(len, (self.missing, self.misshapen, self.unusable, self.left)))

    def __str__(self) -> str:
        kinds = {
            "missing": self.missing,
            "without a place in the network": self.left,
            "of another shape": self.misshapen,
            "unusable": self.unusable,
        }
        return "; ".join(f"{len(names)} {kind}: {shown(names)}" for kind, names in kinds.items() if names)


def match_arrays(like: Variables, state: Arrays, rules: Rules, dtype: Any = np.float32) -> Match:
    """Give a student's variables the values of a PyTorch network.

    Args:
        like: `{"params": {"stem", ..., "head"}, "batch_stats": ...}` of arrays or shapes.
        state: the network's `state_dict()`.
        rules: substitutions that turn our names into those of the network.
        dtype: of the result.
    """
    match = Match()
    used: set[str] = set()

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        theirs = torch_name(name, rules)
        used.add(theirs)
        if theirs not in state:
            match.missing.append(theirs)
            return np.zeros(shape, dtype)
        value = np.asarray(state[theirs])
        fitted = _to_jax(value, shape)
        if fitted.shape != shape:
            needed = tuple(shape[axis] for axis in _TO_TORCH.get(len(shape), range(len(shape))))
            match.misshapen.append(f"{theirs} is {value.shape} and must be {needed}")
            return np.zeros(shape, dtype)
        if fault := _fault(theirs, value):
            match.unusable.append(f"{theirs} {fault}")
            return np.zeros(shape, dtype)
        match.matched += 1
        return fitted.astype(dtype)

    def leaf(path: Any, leaf: Any) -> np.ndarray:
        values = [take(name, shape) for name, shape in block_names(path, leaf.shape)]
        return np.stack(values) if is_stacked(path) else values[0]

    match.variables = jax.tree_util.tree_map_with_path(leaf, like)
    for name in state:
        if name not in used and not _is_bookkeeping(name, state[name]):
            (match.auxiliary if _AUXILIARY.fullmatch(name) else match.left).append(name)
    return match


def state_dict(variables: Variables, rules: Rules) -> dict[str, np.ndarray]:
    """Return a student's variables as the `state_dict()` of a PyTorch network; the inverse of `match_arrays`.

    Args:
        variables: `{"params": {"stem", ..., "head"}, "batch_stats": ...}`.
        rules: substitutions that turn our names into those of the network.

    Raises:
        ValueError: two arrays get the same name.
    """
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        blocks = leaf if is_stacked(path) else [leaf]
        for (ours, _), value in zip(block_names(path, leaf.shape), blocks, strict=True):
            theirs = torch_name(ours, rules)
            if theirs in arrays:
                raise ValueError(f"two arrays are called {theirs}")
            axes = _TO_TORCH.get(value.ndim, range(value.ndim))
            arrays[theirs] = np.ascontiguousarray(np.asarray(value).transpose(*axes))
    return arrays


def block_names(path: Any, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of a leaf, or of every block in it if blocks are stacked.

    Names lack the collection and number the blocks of a stage from 0: "stage1.0.conv1.kernel".
    """
    _, *parts = (key.key for key in path)
    if not is_stacked(path):
        yield ".".join("0" if part == "first" else part for part in parts), shape
        return
    for block in range(shape[0]):
        yield ".".join(str(block + 1) if part == "rest" else part for part in parts), shape[1:]


def is_stacked(path: Any) -> bool:
    """Return whether a leaf holds all equal blocks of a stage, see `blocks.Stage`."""
    return any(key.key == "rest" for key in path)


def _to_jax(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array in our layout. A linear layer and a 1x1 convolution may stand for one another."""
    value = value.transpose(_TO_JAX[value.ndim]) if value.ndim in _TO_JAX else value
    if value.ndim == 2 and len(shape) == 4:
        value = value[None, None]
    elif value.ndim == 4 and len(shape) == 2 and value.shape[:2] == (1, 1):
        value = value[0, 0]
    if value.ndim == 2 and value.shape != shape and value.shape[::-1] == shape:
        value = value.T  # it is stored as (in, out)
    return value


def _fault(name: str, value: np.ndarray) -> str:
    """Return what makes the values unusable, or ""."""
    if value.dtype.kind != "f":
        return f"has {value.dtype} values, not floats"
    if not (np.abs(value) <= np.finfo(np.float32).max).all():
        return "has NaN or infinite values"
    return "has negative values" if name.endswith("running_var") and (value < 0).any() else ""


def _is_bookkeeping(name: str, value: Any) -> bool:
    """Return whether it is a count, such as the number of averaged steps, or a state of random numbers."""
    value = np.asarray(value)
    counts = _COUNTERS.fullmatch(name) or ("." not in name and value.size == 1)
    return bool(counts) or (value.dtype == np.uint8 and value.ndim == 1)


def shown(names: Sequence[str]) -> str:
    """Return the first few names, weights before others, and how many more there are."""
    names = sorted(names, key=lambda name: ".weight" not in name)  # people know these
    more = f", and {len(names) - PROBLEMS_SHOWN} more" if len(names) > PROBLEMS_SHOWN else ""
    return ", ".join(names[:PROBLEMS_SHOWN]) + more
