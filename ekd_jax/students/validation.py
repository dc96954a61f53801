"""Checks of a student from elsewhere: its description and its weights must make sense before they are used."""

import math
import re
from collections.abc import Iterator, Mapping

import numpy as np
from flax.traverse_util import flatten_dict

from ekd_jax.models.ensemble import Variables
from ekd_jax.models.members import parse_width
from ekd_jax.students.description import Preprocessing, StudentDescription

MAX_PIXELS = 4096 * 4096  # of a network's input
MAX_CLASSES = 1_000_000
DTYPES = ("float32", "bfloat16", "float16")
FITS = ("native", "stretch", "crop")
PADDINGS = ("", "even", "same")
ARRAYS_SHOWN = 3


def problem_of_description(own: StudentDescription) -> str:
    """Return what is wrong with a description, "" if nothing is; its field types have been checked."""
    return next(_problems(own), "")


def _problems(own: StudentDescription) -> Iterator[str]:
    network, names = own.network, own.class_names
    height, width, channels = network.input_shape
    if min(height, width) < 1 or height * width > MAX_PIXELS or channels not in (1, 3):
        yield f"network.input_shape is {_by(network.input_shape)}, not H x W x 1 or 3 of at most 4096x4096"
    if not 2 <= network.num_classes <= MAX_CLASSES:
        yield f"network.num_classes is {network.num_classes}, not 2 to {MAX_CLASSES:,}"
    if len(names) != network.num_classes:
        yield f"class_names has {len(names)} names, network.num_classes is {network.num_classes}"
    if len(set(names)) < len(names) or "" in names:
        yield "class_names has an empty name, or the same name twice"
    if network.dtype not in DTYPES:
        yield f"network.dtype is {network.dtype!r}, not one of {', '.join(DTYPES)}"
    for text in network.widths:
        try:
            parse_width(text)
        except ValueError as error:
            yield f"network.widths has {text!r}, which {error}"
    if not network.widths:
        yield "network.widths is empty"
    yield from _problems_of_options(network.options)
    for module in network.imports:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module):
            yield f"network.imports has {module!r}, which is not the name of a module"
    yield from _problems_of_preprocessing(own.preprocessing, network.input_shape)
    if own.student < 1 or own.parameters < 1 or own.macs < 0:
        yield "student and parameters must be at least 1, macs at least 0"
    if not all(map(math.isfinite, own.metrics.values())):
        yield "metrics has a value that is not finite"
    if own.by_class and (unknown := sorted(own.by_class.keys() - set(names))):
        yield f"by_class has {unknown[0]!r}, which is no class"


def _problems_of_options(options: Mapping[str, object]) -> Iterator[str]:
    for name, value in options.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        match name:
            case "dropout" | "stochastic_depth":
                allowed = number and -1 <= value < 1  # type: ignore[operator]
            case "batch_norm_epsilon":
                allowed = number and 0 < value < 1  # type: ignore[operator]
            case "padding":
                allowed = value in PADDINGS
            case _:
                yield f"network.options has {name!r}, which this version does not know"
                continue
        if not allowed:
            yield f"network.options has {name}={value!r}, which is not possible"


def _problems_of_preprocessing(own: Preprocessing, shape: tuple[int, int, int]) -> Iterator[str]:
    for name, values in (("mean", own.mean), ("std", own.std)):
        if len(values) not in (1, shape[2]) or not all(map(math.isfinite, values)):
            yield f"preprocessing.{name} is {list(values)}, not 1 or {shape[2]} finite numbers"
    if any(value <= 0 for value in own.std):
        yield f"preprocessing.std is {list(own.std)}: it must be above 0"
    if own.fit not in FITS:
        yield f"preprocessing.fit is {own.fit!r}, not one of {', '.join(FITS)}"
    if own.image_size and (own.image_size, own.image_size) != shape[:2]:
        yield f"preprocessing.image_size is {own.image_size}, network.input_shape {_by(shape)}"


def problem_of_weights(given: Mapping[str, np.ndarray], like: Variables) -> str:
    """Return what is wrong with the weights of a student, "" if nothing is.

    Args:
        given: arrays by their path, "params/stem/conv/kernel".
        like: the variables of its network, arrays or shapes.
    """
    wanted = flatten_dict(like, sep="/")
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    for what, names in (("lacks", missing), ("also has", unknown)):
        if names:
            more = f" and {len(names) - ARRAYS_SHOWN} more" if len(names) > ARRAYS_SHOWN else ""
            return f"it {what} {', '.join(map(repr, names[:ARRAYS_SHOWN]))}{more}"
    for name, array in sorted(given.items()):
        leaf = wanted[name]
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            found, needed = (f"{a.dtype} {_by(a.shape)}" for a in (array, leaf))
            return f"{name} is {found}, its network needs {needed}"
        if not np.isfinite(array).all():
            return f"{name} has values that are not finite (NaN or infinity)"
        if name.endswith("/var") and (array < 0).any():
            return f"{name} has a negative variance"
    return ""


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
