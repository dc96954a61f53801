"""Rules for operations that move values: new axes, other shapes, parts, and zeros around them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ekd_jax.students.formats.onnx_writer import (
    NCHW,
    Tensor,
    UnsupportedError,
    Value,
    Writer,
    is_symbolic,
    need,
    rule,
    same,
    shape_of,
)


@rule("transpose")
def _transpose(writer: Writer, equation: Any, x: Tensor) -> Tensor:
    """Give axes new numbers; nothing is moved."""
    moved = equation.params["permutation"]
    order = tuple(moved.index(axis) for axis in x.order)
    return dataclasses.replace(x, order=order, shape=tuple(x.shape[axis] for axis in moved))


@rule("broadcast_in_dim", "expand_dims")
def _broadcast(writer: Writer, equation: Any, x: Value, *_: Value) -> Value:
    shape = equation.outvars[0].aval.shape
    if equation.primitive.name == "expand_dims":
        old: Any = [axis for axis in range(len(shape)) if axis not in equation.params["dimensions"]]
    else:
        old = equation.params["broadcast_dimensions"]
    if isinstance(x, np.ndarray):
        sizes = [1] * len(shape)
        for axis, place in enumerate(old):
            sizes[place] = x.shape[axis]
        x = x.reshape(sizes)
        return x if is_symbolic(equation.outvars) else np.broadcast_to(x, shape)
    new = [axis for axis in range(len(shape)) if axis not in old]
    kept = [1] * len(shape)
    for axis, place in enumerate(old):
        kept[place] = x.shape[axis]
    if not new:
        return dataclasses.replace(x, shape=tuple(kept))
    x = writer.scaled(x)
    order = tuple(old[axis] for axis in x.order)
    # a new axis stands where it will be needed: beside convolutions, if images are made of it
    target = NCHW if len(shape) == 4 and order == (0, 3) else (*order, *new) if len(shape) != 4 else None
    if target is None or [axis for axis in target if axis in order] != list(order):
        target = tuple(range(len(shape)))
        x = Tensor(writer.stored(x, tuple(range(len(x.shape)))), tuple(range(len(x.shape))), x.shape)
    places = [place for place, axis in enumerate(target) if axis in new]
    name = writer.graph.add("Unsqueeze", x.name, writer.graph.integers(places))
    return Tensor(name, tuple(target), tuple(kept))


@rule("squeeze")
def _squeeze(writer: Writer, equation: Any, x: Tensor) -> Tensor:
    x, gone = writer.scaled(x), equation.params["dimensions"]
    kept = [axis for axis in x.order if axis not in gone]
    places = sorted(x.order.index(axis) for axis in gone)
    name = writer.graph.add("Squeeze", x.name, writer.graph.integers(places))
    order = tuple(sorted(kept).index(axis) for axis in kept)
    return Tensor(name, order, tuple(n for axis, n in enumerate(x.shape) if axis not in gone))


@rule("concatenate")
def _concatenate(writer: Writer, equation: Any, *values: Value) -> Tensor:
    axis, shape = equation.params["dimension"], equation.outvars[0].aval.shape
    order = NCHW if len(shape) == 4 else next(v.order for v in values if isinstance(v, Tensor))
    wholes = [writer.whole(value, shape_of(equation, place)) for place, value in enumerate(values)]
    names = [writer.stored(value, order) for value in wholes]
    return Tensor(writer.graph.add("Concat", *names, axis=order.index(axis)), order, shape)


@rule("stack")
def _stack(writer: Writer, equation: Any, *values: Value) -> Tensor:
    axis, shape = equation.params["axis"], equation.outvars[0].aval.shape
    places, order = writer.graph.integers([axis]), tuple(range(len(shape) - 1))
    wholes = [writer.whole(value, shape_of(equation, place)) for place, value in enumerate(values)]
    names = [writer.graph.add("Unsqueeze", writer.stored(value, order), places) for value in wholes]
    return Tensor(writer.graph.add("Concat", *names, axis=axis), tuple(range(len(shape))), shape)


@rule("unstack")
def _unstack(writer: Writer, equation: Any, x: Tensor) -> list[Tensor]:
    axis, shape = equation.params["axis"], shape_of(equation)
    x = writer.whole(x, shape)  # type: ignore[assignment]
    place = x.order.index(axis)
    sizes = writer.graph.integers([1] * shape[axis])
    parts = writer.graph.add_several("Split", shape[axis], x.name, sizes, axis=place)
    order = tuple(other - (other > axis) for other in x.order if other != axis)
    return [
        Tensor(writer.graph.add("Squeeze", part, writer.graph.integers([place])), order, result.aval.shape)
        for part, result in zip(parts, equation.outvars, strict=True)
    ]


@rule("slice")
def _slice(writer: Writer, equation: Any, x: Tensor) -> Tensor:
    params, shape = equation.params, shape_of(equation)
    x = writer.whole(x, shape)  # type: ignore[assignment]
    strides = params["strides"] or (1,) * len(shape)
    starts, ends = params["start_indices"], params["limit_indices"]
    cut = [
        axis
        for axis, size in enumerate(shape)
        if not (same(starts[axis], 0) and same(ends[axis], size) and strides[axis] == 1)
    ]
    if not cut:
        return x
    need(all(isinstance(v, int) for axis in cut for v in (starts[axis], ends[axis])), "cut over images")
    parts = ([v[axis] for axis in cut] for v in (starts, ends))
    places, steps = [x.order.index(axis) for axis in cut], [strides[axis] for axis in cut]
    names = [writer.graph.integers(values) for values in (*parts, places, steps)]
    return Tensor(writer.graph.add("Slice", x.name, *names), x.order, equation.outvars[0].aval.shape)


@rule("split")
def _split(writer: Writer, equation: Any, x: Tensor) -> list[Tensor]:
    sizes, axis = equation.params["sizes"], equation.params["axis"]
    x = writer.whole(x, shape_of(equation))  # type: ignore[assignment]
    names = writer.graph.add_several(
        "Split", len(sizes), x.name, writer.graph.integers(sizes), axis=x.order.index(axis)
    )
    return [Tensor(name, x.order, v.aval.shape) for name, v in zip(names, equation.outvars, strict=True)]


@rule("pad")
def _pad(writer: Writer, equation: Any, x: Tensor, fill: Value) -> Tensor:
    """Write zeros, or another constant, around a value; where the number is negative, something is cut off."""
    config, shape = equation.params["padding_config"], shape_of(equation)
    x = writer.whole(x, shape)  # type: ignore[assignment]
    need(all(inner == 0 for _, _, inner in config), "zeros between values")
    if not isinstance(fill, np.ndarray):
        raise UnsupportedError("a filling that is no constant")
    cut = [axis for axis, (low, high, _) in enumerate(config) if low < 0 or high < 0]
    name = x.name
    if cut:
        starts = [max(0, -config[axis][0]) for axis in cut]
        ends = [shape[axis] + min(0, config[axis][1]) for axis in cut]
        parts = starts, ends, [x.order.index(axis) for axis in cut]
        name = writer.graph.add("Slice", name, *map(writer.graph.integers, parts))
    low, high = ([max(config[axis][side], 0) for axis in x.order] for side in (0, 1))
    if any((*low, *high)):
        value = writer.graph.constant(fill.astype(np.float32))
        name = writer.graph.add("Pad", name, writer.graph.integers([*low, *high]), value)
    return Tensor(name, x.order, equation.outvars[0].aval.shape)


@rule("reshape")
def _reshape(writer: Writer, equation: Any, x: Tensor, *_: Value) -> Tensor:
    """Split and join axes; those that are joined are first stored side by side."""
    old, new = shape_of(equation), equation.outvars[0].aval.shape
    x = writer.whole(x, old)  # type: ignore[assignment]
    groups = _groups(old, new)
    blocks = [before for before, _ in groups]
    order = [axis for axis in x.order if any(axis == before[0] for before in blocks if before)]
    wanted = [
        axis for first in order for before in blocks if before and before[0] == first for axis in before
    ]
    name = writer.stored(x, wanted)
    joined = {before[0]: after for before, after in groups if before}
    after = [axis for first in order for axis in joined[first]]
    sizes = [new[axis] if isinstance(new[axis], int) else -1 for axis in after]
    need(sizes.count(-1) <= 1, "axes over several images")
    return Tensor(writer.graph.add("Reshape", name, writer.graph.integers(sizes)), tuple(after), new)


def _groups(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Return which axes of one shape become which of another: groups of equal size, in order."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        before, after = [i], [j]
        size, target = old[i], new[j]
        i, j = i + 1, j + 1
        while not same(size, target):
            fewer = isinstance(size, int) and (not isinstance(target, int) or size < target)
            need(i < len(old) if fewer else j < len(new), "shapes that do not divide each other")
            if fewer:
                size, i = size * old[i], i + 1
                before.append(i - 1)
            else:
                target, j = target * new[j], j + 1
                after.append(j - 1)
        groups.append((before, after))
    if groups:  # what is left has size 1
        groups[-1][0].extend(range(i, len(old)))
        groups[-1][1].extend(range(j, len(new)))
    return groups
