"""PyTorch state dicts of the official code as variables of ours.

    variables = official_variables(ensemble, method, base_state, student_states, adaptation)

State dicts are mappings from PyTorch names to anything `numpy.asarray` takes (CPU tensors, arrays).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ekd_jax.errors import UserError, nearest
from ekd_jax.models.ensemble import Ensemble, Variables

Arrays = Mapping[str, Any]

# Our name -> the official one, for the parts of a path (models/ResNet_cifar.py).
_MODULES = {
    "conv": "conv1",
    "bn": "bn1",
    "shortcut_conv": "shortcut.0",
    "shortcut_bn": "shortcut.1",
    "head": "linear",
    "stage1": "layer1",
    "stage2": "layer2",
    "stage3": "layer3",
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def official_variables(
    ensemble: Ensemble,
    seed_variables: Variables,
    base: Arrays,
    students: Sequence[Arrays],
    adaptation: Arrays | None = None,
) -> Variables:
    """Variables with every value replaced by the official model's.

    Args:
        ensemble: a CIFAR ResNet with as many students as there are state dicts.
        seed_variables: as `state.init_variables` returns them; give structure and shapes.
        base: `state_dict()` of the official `BaseNet`.
        students: `state_dict()` of each official student, in order.
        adaptation: `{"b<block>_s<student>/w": (out, in), ".../b": (out,)}`, both counted from 0;
            the method's own values are kept if not given.

    Returns:
        A tree like `seed_variables`, numpy float32.

    Raises:
        UserError: what is missing, left over or of another shape, all of it in one line.
    """
    if len(students) != len(ensemble.students):
        raise UserError(f"{len(students)} state dicts for a network of {len(ensemble.students)} students")
    sources = {"base": _plain(base), **{str(i): _plain(s) for i, s in enumerate(students, 1)}}
    used: dict[str, set[str]] = {where: set() for where in sources}
    problems: list[str] = []

    def take(where: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        used[where].add(name)
        source = sources[where]
        label = "base" if where == "base" else f"student {where}"
        if name not in source:
            problems.append(f"{label} has no {name}{nearest(name, source)}")
            return np.zeros(shape, np.float32)
        value = _to_ours(source[name])
        if value.shape != shape:
            problems.append(f"{label}: {name} becomes {value.shape}, the network needs {shape}")
            return np.zeros(shape, np.float32)
        return value

    def convert(path: Any, leaf: Any) -> np.ndarray:
        _, *parts = (key.key for key in path)  # collection, then base/... or students/<i>/...
        where = parts.pop(0)
        if where == "method":
            return np.asarray(leaf)
        if where == "students":
            where = parts.pop(0)
        *modules, last = parts
        if "rest" not in modules:  # not stacked
            return take(where, _official_name(modules, last, 0), leaf.shape)
        return np.stack(
            [
                take(where, _official_name(modules, last, 1 + k), leaf.shape[1:])
                for k in range(leaf.shape[0])
            ]
        )

    variables: Variables = jax.tree_util.tree_map_with_path(convert, seed_variables)
    for where, source in sources.items():
        left = [n for n in source if n not in used[where] and not n.endswith("num_batches_tracked")]
        problems += [f"{where}: {name} has no place in the network" for name in left]
    if adaptation is not None:
        layers = variables["params"]["method"]["adaptation_layers"]
        for name, layer in layers.items():
            block, student = map(int, re.findall(r"\d+", name))
            key = f"b{block - 1}_s{student - 1}"
            layer["kernel"] = _to_ours(adaptation[f"{key}/w"])
            layer["bias"] = _to_ours(adaptation[f"{key}/b"])
    if problems:
        raise UserError("the state dicts do not fit: " + "; ".join(problems))
    return variables


def _official_name(modules: Sequence[str], leaf: str, block: int) -> str:
    parts = [str(block) if m in ("first", "rest") else _MODULES.get(m, m) for m in modules]
    return ".".join([*parts, _LEAVES[leaf]])


def _plain(state: Arrays) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float32) for name, value in state.items()}


def _to_ours(value: Any) -> np.ndarray:
    """OIHW -> HWIO, (out, in) -> (in, out), vectors as they are."""
    value = np.asarray(value, np.float32)
    return value.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,), 0: ()}[value.ndim])
