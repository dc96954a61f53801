"""PyTorch weights as a student's variables."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from ekd_jax import models
from ekd_jax.common.errors import UserError, reason
from ekd_jax.models.cost import count_parameters
from ekd_jax.models.ensemble import Variables
from ekd_jax.students.description import NetworkDescription
from ekd_jax.students.torch_names import Rules, Source, sources, torch_name

Arrays = Mapping[str, Any]  # a state_dict(): names to anything that numpy.asarray takes
PROBLEMS_SHOWN = 8  # how many problems an error names; the others are counted
_TO_JAX = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,), 0: ()}  # OIHW -> HWIO, (out, in) -> (in, out)


def match_arrays(
    like: Variables, state: Arrays, rules: Rules, dtype: Any = np.float32
) -> tuple[Variables, list[str]]:
    """Give a student's variables the values of a PyTorch network.

    Args:
        like: `{"params": {"stem", ..., "head"}, "batch_stats": ...}` of arrays or shapes.
        state: the network's `state_dict()`.
        rules: substitutions that turn our names into those of the network.
        dtype: of the result.

    Returns:
        A tree like `like` of numpy arrays, zeros where an array does not fit; and a line for each array that is
        missing, left over or of another shape.
    """
    used: set[str] = set()
    problems: list[str] = []

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        theirs = torch_name(name, rules)
        used.add(theirs)
        if theirs not in state:
            problems.append(f"{theirs} is missing")
            return np.zeros(shape, dtype)
        value = _to_jax(state[theirs], dtype)
        if value.shape != shape:
            problems.append(f"{theirs} becomes {value.shape}, the network needs {shape}")
            return np.zeros(shape, dtype)
        return value

    def leaf(path: Any, leaf: Any) -> np.ndarray:
        values = [take(name, shape) for name, shape in block_names(path, leaf.shape)]
        return np.stack(values) if is_stacked(path) else values[0]

    variables = jax.tree_util.tree_map_with_path(leaf, like)
    left = [name for name in state if name not in used and not name.endswith("num_batches_tracked")]
    return variables, problems + [f"{name} has no place in the network" for name in left]


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


def _to_jax(value: Any, dtype: Any) -> np.ndarray:
    value = np.asarray(value, dtype)
    return value.transpose(_TO_JAX[value.ndim])


def _misfit(problems: Sequence[str]) -> UserError:
    more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
    return UserError("the weights do not fit: " + "; ".join(problems[:PROBLEMS_SHOWN]) + more)


@dataclasses.dataclass(frozen=True)
class Converted:
    """A network with the values of a state dict.

    Attributes:
        variables: as `LoadedStudent` has them.
        network: how to build it again.
        parameters: number of its parameters.
        macs: multiply-accumulates for one image.
    """

    variables: Variables
    network: NetworkDescription
    parameters: int
    macs: int


def convert(
    model: str, state: Arrays, input_shape: tuple[int, int, int], options: Mapping[str, Any]
) -> Converted:
    """Return the network `model`, as a student of width 1, with the values of a state dict.

    If several libraries have the network, the one whose names fit best is taken. The number of classes is
    that of the classifier.

    Args:
        model: a key of `models.MODELS`.
        state: the network's `state_dict()`.
        input_shape: H, W, C.
        options: fields of `models.EnsembleSpec`, which override what the library's network needs.

    Raises:
        UserError: no library has the network, or arrays are missing, left over or of another shape.
    """
    known = sources(model)
    if not known:
        raise UserError(
            f"--model={model}: there are no rules to convert its weights (ekd_jax/students/torch_names.py)"
        )
    fits = [_convert_from(source, model, state, input_shape, options) for source in known]
    converted, problems = min(fits, key=lambda fit: len(fit[1]))
    if problems:
        raise _misfit(problems)
    return converted


def _convert_from(
    source: Source,
    model: str,
    state: Arrays,
    input_shape: tuple[int, int, int],
    options: Mapping[str, Any],
) -> tuple[Converted, list[str]]:
    """Convert by the names of one library; return also a line for each array that does not fit."""
    classifier = state.get(torch_name("head.linear.kernel", source.rules))
    classes = 1 if classifier is None else len(classifier)
    own = {**source.options, **options}
    ensemble = models.build_ensemble(model, 1, classes, sharing="none", **own)
    trace = ensemble.trace(input_shape)
    like = ensemble.student_variables(trace.init(None), 1)
    variables, problems = match_arrays(like, state, source.rules)
    network = NetworkDescription(
        name=model,
        widths=tuple(str(width) for width in ensemble.widths[0]),
        num_classes=classes,
        input_shape=input_shape,
        dtype="float32",
        options=own,
    )
    parameters = count_parameters(variables["params"])
    return Converted(variables, network, parameters, trace.cost(1).macs), problems


def read_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read the arrays of a .safetensors, .pt or .pth file.

    Raises:
        UserError: the file is none of these or cannot be read, or PyTorch is not installed.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.numpy.load_file(path))
        if path.suffix not in (".pt", ".pth"):
            raise UserError(f"--weights={path}: must be a .safetensors, .pt or .pth file")
        import torch
    except ImportError:
        raise UserError(
            f"--weights={path}: reading it needs PyTorch (pip install torch); or save it as .safetensors"
        ) from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"--weights={path} cannot be read: {reason(error)}") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise many kinds
        raise UserError(f"--weights={path} cannot be read: {reason(error)}") from error
    state = loaded.get("state_dict", loaded.get("model", loaded))
    return {name.removeprefix("module."): value.numpy() for name, value in state.items()}
