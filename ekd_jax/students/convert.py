"""TODO: students.convert."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from ekd_jax import models
from ekd_jax.common.errors import UserError, reason
from ekd_jax.models.cost import count_parameters
from ekd_jax.models.ensemble import Ensemble, Variables
from ekd_jax.students.description import NetworkDescription
from ekd_jax.students.torch_names import Rules, sources, torch_name

Arrays = Mapping[str, Any]
SHOWN = 8  # problems that an error names; the others are counted
_TRANSPOSED = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,), 0: ()}  # OIHW -> HWIO, (out, in) -> (in, out)


def student_from_torch(like: Variables, state: Arrays, rules: Rules, dtype: Any = np.float32) -> Variables:
    """A student's variables with the values of a PyTorch network.

    Args:
        like: `{"params": {"stem", ..., "head"}, "batch_stats": same}` of arrays or shapes.
        state: `state_dict()`: names to what `numpy.asarray` takes (CPU tensors, arrays).
        rules: substitutions that make its names of ours.
        dtype: of the result.

    Returns:
        A tree like `like`, numpy.

    Raises:
        UserError: what is missing, left over or of another shape, in one line.
    """
    variables, problems = _convert(like, state, rules, dtype)
    if problems:
        raise _misfit(problems)
    return variables


def official_variables(
    ensemble: Ensemble,
    seed_variables: Variables,
    base: Arrays,
    students: Sequence[Arrays],
    adaptation: Arrays | None = None,
) -> Variables:
    """An ensemble's variables with every value replaced by the official code's model's.

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
        UserError: what is missing, left over or of another shape, in one line.
    """
    if len(students) != len(ensemble.students):
        raise UserError(f"{len(students)} state dicts for a network of {len(ensemble.students)} students")
    rules = sources("resnet20")[0].rules
    problems: list[str] = []
    variables: Variables = jax.tree.map(np.asarray, seed_variables)
    for number, student in enumerate(students, 1):
        own, found = _convert(
            ensemble.student_variables(seed_variables, number), {**base, **student}, rules
        )
        problems += [
            problem if problem.split()[0] in base else f"student {number}: {problem}" for problem in found
        ]
        variables = ensemble.with_student_variables(variables, number, own)
    if adaptation is not None:
        layers = variables["params"]["method"]["adaptation_layers"]
        for name, layer in layers.items():
            block, number = map(int, re.findall(r"\d+", name))
            key = f"b{block - 1}_s{number - 1}"
            layer["kernel"] = _to_ours(adaptation[f"{key}/w"])
            layer["bias"] = _to_ours(adaptation[f"{key}/b"])
    if problems:
        raise _misfit(list(dict.fromkeys(problems)))  # of the base block once
    return variables


def _convert(
    like: Variables, state: Arrays, rules: Rules, dtype: Any = np.float32
) -> tuple[Variables, list[str]]:
    """The variables, zeros where something is wrong, and what is wrong."""
    used: set[str] = set()
    problems: list[str] = []

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        theirs = torch_name(name, rules)
        used.add(theirs)
        if theirs not in state:
            problems.append(f"{theirs} is missing")
            return np.zeros(shape, dtype)
        value = _to_ours(state[theirs], dtype)
        if value.shape != shape:
            problems.append(f"{theirs} becomes {value.shape}, the network needs {shape}")
            return np.zeros(shape, dtype)
        return value

    def leaf(path: Any, leaf: Any) -> np.ndarray:
        values = [take(name, shape) for name, shape in _names(path, leaf.shape)]
        return np.stack(values) if _stacked(path) else values[0]

    variables = jax.tree_util.tree_map_with_path(leaf, like)
    left = [name for name in state if name not in used and not name.endswith("num_batches_tracked")]
    return variables, problems + [f"{name} has no place in the network" for name in left]


def _names(path: Any, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what a leaf of (collection, ...) holds: of each block."""
    _, *parts = (key.key for key in path)
    if not _stacked(path):
        yield ".".join("0" if part == "first" else part for part in parts), shape
        return
    for block in range(shape[0]):
        yield ".".join(str(block + 1) if part == "rest" else part for part in parts), shape[1:]


def _stacked(path: Any) -> bool:
    return any(key.key == "rest" for key in path)


def _to_ours(value: Any, dtype: Any = np.float32) -> np.ndarray:
    value = np.asarray(value, dtype)
    return value.transpose(_TRANSPOSED[value.ndim])


def _misfit(problems: Sequence[str]) -> UserError:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return UserError("the weights do not fit: " + "; ".join(problems[:SHOWN]) + more)


@dataclasses.dataclass(frozen=True)
class Converted:
    """A network with the values of a state dict.

    Attributes:
        variables: as `LoadedStudent` has them.
        network: how to build it again.
        parameters: how many it has.
        macs: multiply-accumulates for one image.
    """

    variables: Variables
    network: NetworkDescription
    parameters: int
    macs: int


def convert(
    model: str, state: Arrays, input_shape: tuple[int, int, int], options: Mapping[str, Any]
) -> Converted:
    """The network `model`, as a student of width 1, with the values of a state dict.

    Of the libraries that have such a network the one is taken whose names fit best; how many classes there
    are follows from the classifier.

    Args:
        model: a key of `models.MODELS`.
        state: `state_dict()`.
        input_shape: H, W, C.
        options: of `models.build`, stronger than what the library's networks need.

    Raises:
        UserError: no library has the network; what does not fit, in one line.
    """
    known = sources(model)
    if not known:
        raise UserError(
            f"--model={model}: there are no rules to convert its weights (ekd_jax/torch_names.py)"
        )
    best: tuple[Variables, list[str]] | None = None
    for source in known:
        classifier = state.get(torch_name("head.linear.kernel", source.rules))
        classes = 1 if classifier is None else len(classifier)
        own = {**source.options, **options}
        ensemble = models.build_ensemble(model, 1, classes, sharing="none", **own)
        trace = ensemble.trace(input_shape)
        like = ensemble.student_variables(trace.init(None), 1)
        variables, problems = _convert(like, state, source.rules)
        if best is None or len(problems) < len(best[1]):
            best = variables, problems
            cost = trace.cost(1)
            network = NetworkDescription(
                name=model,
                widths=tuple(str(width) for width in ensemble.widths[0]),
                num_classes=classes,
                input_shape=input_shape,
                dtype="float32",
                options=own,
            )
    assert best is not None
    variables, problems = best
    if problems:
        raise _misfit(problems)
    return Converted(variables, network, count_parameters(variables["params"]), cost.macs)


def read_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors, .pt or .pth file.

    Raises:
        UserError: not such a file, or PyTorch is not installed.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.numpy.load_file(path))
        if path.suffix not in (".pt", ".pth"):
            raise UserError(f"--weights={path}: a .safetensors, .pt or .pth file is wanted")
        import torch
    except ImportError:
        raise UserError(
            f"--weights={path}: PyTorch is needed to read it (pip install torch), or save it as "
            f".safetensors"
        ) from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"--weights={path} cannot be read: {reason(error)}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise many kinds
        raise UserError(f"--weights={path} cannot be read: {reason(error)}") from error
    found = found.get("state_dict", found.get("model", found))
    return {name.removeprefix("module."): value.numpy() for name, value in found.items()}
