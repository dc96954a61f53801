"""Rules that turn the operations of a JAX program into nodes of ONNX.

ONNX computes convolutions on (B, C, H, W), JAX programs here on (B, H, W, C). A value therefore knows in which order
its axes are stored, and is transposed only where an operation needs another order.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ekd_jax.students.formats.onnx_graph import Graph

NCHW = (0, 3, 1, 2)
ALIKE = {"float32", "bfloat16"}  # both become float32

# What is done to constants, such as the values of batch norm, in float32 as JAX does.
FOLDED: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}
NEVER_FOLDED = ("broadcast_in_dim", "dim_as_value")  # they may depend on the number of images


class UnsupportedError(Exception):
    """A program has an operation that cannot be written."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value of the graph.

    Attributes:
        name: of the output of a node.
        order: which axis of the program's value is stored first, second, ...
        shape: of the program's value, 1 for an axis over which it is only broadcast when it is used.
        scale: a factor that was not applied yet.
    """

    name: str
    order: tuple[int, ...]
    shape: tuple[Any, ...]
    scale: float = 1.0


Value = Tensor | np.ndarray  # an array is a constant
Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
INLINED = (
    "pjit",
    "jit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat",
    "checkpoint",
)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function (writer, equation, *values) -> value, or a list of values, for primitives of JAX."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Writer:
    """Writes a JAX program, equation by equation, into a graph."""

    def __init__(self) -> None:
        self.graph = Graph()
        self._transposed: dict[tuple[str, tuple[int, ...]], str] = {}

    def run(self, jaxpr: Any, constants: Sequence[Value], arguments: Sequence[Value]) -> list[Value]:
        """Write the equations of a jaxpr; return its results.

        Raises:
            UnsupportedError: an operation has no rule, or is used in a way that its rule does not know.
        """
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, constants, strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Value:
            return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.eqns:
            results = self._write(equation, [read(atom) for atom in equation.invars])
            values |= dict(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _write(self, equation: Any, values: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        if name in INLINED:
            inner = params.get("jaxpr") or params.get("call_jaxpr") or params.get("fun_jaxpr")
            closed = hasattr(inner, "consts")
            constants = [np.asarray(c) for c in inner.consts] if closed else []
            return self.run(inner.jaxpr if closed else inner, constants, values)
        constant = all(isinstance(value, np.ndarray) for value in values) and name not in NEVER_FOLDED
        if constant and not _is_symbolic(equation.outvars):
            shapes = zip(values, equation.invars, strict=True)
            need(all(np.shape(v) == atom.aval.shape for v, atom in shapes), f"{name} over all images")
            if name in FOLDED:  # many shapes, each of which JAX would compile
                return [np.asarray(FOLDED[name](*values), equation.outvars[0].aval.dtype)]
            with jax.ensure_compile_time_eval():
                results = equation.primitive.bind(*map(jnp.asarray, values), **params)
            return [np.asarray(r) for r in (results if equation.primitive.multiple_results else [results])]
        if name not in RULES:
            raise UnsupportedError(f"the operation {name} of JAX has no counterpart here")
        try:
            result = RULES[name](self, equation, *values)
        except UnsupportedError as error:
            raise UnsupportedError(f"the operation {name} of JAX is used with {error}") from error
        return result if isinstance(result, list) else [result]

    # --- values ----------------------------------------------------------------------------------

    def stored(self, value: Value, order: Sequence[int]) -> str:
        """Return the name of a value whose axes are stored in this order."""
        if isinstance(value, np.ndarray):
            return self.graph.constant(value.transpose(order) if value.ndim else value)
        value = self.scaled(value)
        if value.order == tuple(order):
            return value.name
        key = value.name, tuple(order)
        if key not in self._transposed:
            moved = [value.order.index(axis) for axis in order]
            self._transposed[key] = self.graph.add("Transpose", value.name, perm=moved)
        return self._transposed[key]

    def scaled(self, value: Tensor) -> Tensor:
        """Return the value with its factor applied."""
        if value.scale == 1.0:
            return value
        name = self.graph.add("Mul", value.name, self.graph.constant(np.float32(value.scale)))
        return Tensor(name, value.order, value.shape)

    def whole(self, value: Value, shape: Sequence[Any]) -> Value:
        """Return a value that is not about to be broadcast, for operations other than elementwise ones."""
        if isinstance(value, np.ndarray):
            symbolic = [n for n in shape if not isinstance(n, int)]
            need(not symbolic, "a constant that is repeated for every image")
            return np.broadcast_to(value, shape)
        need(all(_same(a, b) for a, b in zip(value.shape, shape, strict=True)), "a value that is repeated")
        return self.scaled(value)

    def elementwise(self, op: str, *values: Value, **attributes: Any) -> Tensor:
        """Add a node that computes element by element; ONNX broadcasts as the program does."""
        first = next(value for value in values if isinstance(value, Tensor))
        names = []
        for value in values:
            scalar = isinstance(value, np.ndarray) and value.ndim == 0
            names.append(self.graph.constant(value) if scalar else self.stored(value, first.order))
        sizes = [np.shape(v) if isinstance(v, np.ndarray) else v.shape for v in values]
        rank = len(first.shape)
        shape = tuple(
            next((size[axis] for size in sizes if len(size) == rank and not _same(size[axis], 1)), 1)
            for axis in range(rank)
        )
        return Tensor(self.graph.add(op, *names, **attributes), first.order, shape)


def need(condition: Any, otherwise: str) -> None:
    """Raise UnsupportedError with the words `otherwise` unless a condition holds."""
    if not condition:
        raise UnsupportedError(otherwise)


def _is_symbolic(variables: Sequence[Any]) -> bool:
    return any(
        not isinstance(n, int) for variable in variables for n in getattr(variable.aval, "shape", ())
    )


def _same(a: Any, b: Any) -> bool:
    return a is b or bool(a == b)


def _is_float(equation: Any) -> bool:
    return bool(jnp.issubdtype(equation.invars[0].aval.dtype, jnp.floating))


def _shape_of(equation: Any, place: int = 0) -> tuple[Any, ...]:
    shape: tuple[Any, ...] = equation.invars[place].aval.shape
    return shape


@rule("dim_as_value")
def _number_of_images(writer: Writer, equation: Any) -> Value:
    raise UnsupportedError("the number of images as a value")


# --- element by element ---------------------------------------------------------------------------

UNARY = {
    "logistic": "Sigmoid",
    "exp": "Exp",
    "log": "Log",
    "neg": "Neg",
    "tanh": "Tanh",
    "erf": "Erf",
    "sqrt": "Sqrt",
    "abs": "Abs",
    "floor": "Floor",
}


@rule(*UNARY)
def _unary(writer: Writer, equation: Any, x: Tensor) -> Tensor:
    return writer.elementwise(UNARY[equation.primitive.name], x)


@rule("rsqrt")
def _rsqrt(writer: Writer, equation: Any, x: Tensor) -> Tensor:
    return writer.elementwise("Reciprocal", writer.elementwise("Sqrt", x))


@rule("expm1", "log1p", "erfc")
def _near_one(writer: Writer, equation: Any, x: Tensor) -> Tensor:
    one, name = np.array(1, np.float32), equation.primitive.name
    if name == "log1p":
        return writer.elementwise("Log", writer.elementwise("Add", x, one))
    if name == "expm1":
        return writer.elementwise("Sub", writer.elementwise("Exp", x), one)
    return writer.elementwise("Sub", one, writer.elementwise("Erf", x))


@rule("square")
def _square(writer: Writer, equation: Any, x: Tensor) -> Tensor:
    return writer.elementwise("Mul", x, x)


@rule("integer_pow")
def _integer_pow(writer: Writer, equation: Any, x: Tensor) -> Tensor:
    return writer.elementwise("Pow", x, np.array(equation.params["y"], np.float32))


@rule("pow")
def _pow(writer: Writer, equation: Any, x: Value, y: Value) -> Tensor:
    return writer.elementwise("Pow", x, y)


COMPARISONS = {"gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual", "eq": "Equal"}


@rule(*COMPARISONS)
def _compare(writer: Writer, equation: Any, a: Value, b: Value) -> Tensor:
    return writer.elementwise(COMPARISONS[equation.primitive.name], a, b)


@rule("select_n")
def _select(writer: Writer, equation: Any, which: Value, *values: Value) -> Tensor:
    need(len(values) == 2, "more than two cases")
    otherwise, chosen = values
    return writer.elementwise("Where", which, chosen, otherwise)


@rule("stop_gradient", "copy", "copy_p", "reduce_precision")
def _nothing(writer: Writer, equation: Any, x: Value) -> Value:
    return x


@rule("optimization_barrier")
def _barrier(writer: Writer, equation: Any, *values: Value) -> list[Value]:
    return list(values)


@rule("add", "add_any", "sub", "min")
def _binary(writer: Writer, equation: Any, a: Value, b: Value) -> Tensor:
    name = equation.primitive.name
    return writer.elementwise({"sub": "Sub", "min": "Min"}.get(name, "Add"), a, b)


@rule("mul", "div")
def _product(writer: Writer, equation: Any, a: Value, b: Value) -> Tensor:
    divides = equation.primitive.name == "div"
    for x, factor in ((a, b), (b, a))[: 1 if divides else 2]:
        waiting = isinstance(x, Tensor) and x.scale != 1.0
        if isinstance(x, Tensor) and waiting and isinstance(factor, np.ndarray) and factor.size == 1:
            value = float(factor.reshape(()))
            return dataclasses.replace(x, scale=x.scale / value if divides else x.scale * value)
    return writer.elementwise("Div" if divides else "Mul", a, b)


@rule("max")
def _max(writer: Writer, equation: Any, a: Value, b: Value) -> Tensor:
    for x, limit in ((a, b), (b, a)):
        if isinstance(x, Tensor) and isinstance(limit, np.ndarray) and limit.size == 1 and not limit.any():
            return writer.elementwise("Relu", x)
    return writer.elementwise("Max", a, b)


@rule("clamp")
def _clamp(writer: Writer, equation: Any, low: Value, x: Tensor, high: Value) -> Tensor:
    limits = [value for value in (low, high) if isinstance(value, np.ndarray) and value.size == 1]
    need(len(limits) == 2, "limits that are not constants")
    names = [writer.graph.constant(np.float32(limit.reshape(()))) for limit in limits]
    x = writer.scaled(x)
    return Tensor(writer.graph.add("Clip", x.name, *names), x.order, x.shape)


@rule("convert_element_type")
def _convert(writer: Writer, equation: Any, x: Tensor) -> Tensor:
    old, new = str(equation.invars[0].aval.dtype), str(equation.params["new_dtype"])
    if old == new or {old, new} <= ALIKE:
        return x
    x = writer.scaled(x)
    kind = "float32" if new in ALIKE else new
    return Tensor(writer.graph.add("Cast", x.name, to=kind), x.order, x.shape)


# --- layers ---------------------------------------------------------------------------------------


@rule("conv_general_dilated")
def _convolution(writer: Writer, equation: Any, x: Value, kernel: Value) -> Tensor:
    params = equation.params
    axes = params["dimension_numbers"]
    if not isinstance(kernel, np.ndarray):
        raise UnsupportedError("a kernel that is no constant")
    need(axes.lhs_spec == axes.out_spec == NCHW, "a convolution whose images are not (B, H, W, C)")
    need(set(params["lhs_dilation"]) == {1} and params["batch_group_count"] == 1, "a transposed kernel")
    kernel = kernel.transpose(axes.rhs_spec).astype(np.float32)
    (top, bottom), (left, right) = params["padding"]
    name = writer.graph.add(
        "Conv",
        writer.stored(writer.whole(x, _shape_of(equation)), NCHW),
        writer.graph.constant(np.ascontiguousarray(kernel), "kernel"),
        kernel_shape=kernel.shape[2:],
        strides=params["window_strides"],
        pads=(top, left, bottom, right),
        group=params["feature_group_count"],
        dilations=params["rhs_dilation"],
    )
    return Tensor(name, NCHW, equation.outvars[0].aval.shape)


@rule("reduce_window_max", "reduce_window_sum")
def _pool(writer: Writer, equation: Any, x: Tensor) -> Tensor:
    params = equation.params
    sums = equation.primitive.name == "reduce_window_sum"
    need(not sums or _is_float(equation), "integers")
    window, strides, pads = (params[k] for k in ("window_dimensions", "window_strides", "padding"))
    need(len(window) == 4 and window[0] == window[3] == 1, "a window over images or channels")
    need({*params["base_dilation"], *params["window_dilation"]} == {1}, "a dilated window")
    name = writer.graph.add(
        "AveragePool" if sums else "MaxPool",
        writer.stored(writer.whole(x, _shape_of(equation)), NCHW),
        kernel_shape=window[1:3],
        strides=strides[1:3],
        pads=(pads[1][0], pads[2][0], pads[1][1], pads[2][1]),
        **({"count_include_pad": 1} if sums else {}),
    )
    scale = float(math.prod(window)) if sums else 1.0
    return Tensor(name, NCHW, equation.outvars[0].aval.shape, scale)


@rule("reduce_sum", "reduce_max", "reduce_min")
def _reduce(writer: Writer, equation: Any, x: Tensor) -> Tensor:
    axes, shape = equation.params["axes"], _shape_of(equation)
    x = writer.whole(x, shape)  # type: ignore[assignment]
    kept = [axis for axis in x.order if axis not in axes]
    order = tuple(sorted(kept).index(axis) for axis in kept)
    places = sorted(x.order.index(axis) for axis in axes)
    kind = {"reduce_sum": "ReduceMean", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}
    name = writer.graph.add(kind[equation.primitive.name], x.name, axes=places, keepdims=0)
    scale = 1.0
    if equation.primitive.name == "reduce_sum":
        need(_is_float(equation), "integers")
        sizes = [shape[axis] for axis in axes]
        need(all(isinstance(n, int) for n in sizes), "a sum over images")
        scale = float(math.prod(sizes))
    return Tensor(name, order, equation.outvars[0].aval.shape, scale)


@rule("dot_general")
def _matrix_product(writer: Writer, equation: Any, a: Value, b: Value) -> Tensor:
    """Write a product of matrices; axes that both share come first, as in `jnp.matmul`."""
    (last_a, last_b), (shared_a, shared_b) = equation.params["dimension_numbers"]
    need(len(last_a) == len(last_b) == 1, "a sum over several axes")
    ranks = len(_shape_of(equation, 0)), len(_shape_of(equation, 1))
    free_a, free_b = (
        [axis for axis in range(rank) if axis not in (*last, *shared)]
        for rank, last, shared in zip(ranks, (last_a, last_b), (shared_a, shared_b), strict=True)
    )
    need(len(free_b) == 1 and (len(free_a) == 1 or not shared_a), "a product of more than matrices")
    a, b = (writer.whole(value, _shape_of(equation, place)) for place, value in enumerate((a, b)))
    left = writer.stored(a, (*shared_a, *free_a, *last_a))
    right = writer.stored(b, (*shared_b, *last_b, *free_b))
    shape = equation.outvars[0].aval.shape
    return Tensor(writer.graph.add("MatMul", left, right), tuple(range(len(shape))), shape)


# --- shapes ---------------------------------------------------------------------------------------


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
        return x if _is_symbolic(equation.outvars) else np.broadcast_to(x, shape)
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
    wholes = [writer.whole(value, _shape_of(equation, place)) for place, value in enumerate(values)]
    names = [writer.stored(value, order) for value in wholes]
    return Tensor(writer.graph.add("Concat", *names, axis=order.index(axis)), order, shape)


@rule("stack")
def _stack(writer: Writer, equation: Any, *values: Value) -> Tensor:
    axis, shape = equation.params["axis"], equation.outvars[0].aval.shape
    places, order = writer.graph.integers([axis]), tuple(range(len(shape) - 1))
    wholes = [writer.whole(value, _shape_of(equation, place)) for place, value in enumerate(values)]
    names = [writer.graph.add("Unsqueeze", writer.stored(value, order), places) for value in wholes]
    return Tensor(writer.graph.add("Concat", *names, axis=axis), tuple(range(len(shape))), shape)


@rule("unstack")
def _unstack(writer: Writer, equation: Any, x: Tensor) -> list[Tensor]:
    axis, shape = equation.params["axis"], _shape_of(equation)
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
    params, shape = equation.params, _shape_of(equation)
    x = writer.whole(x, shape)  # type: ignore[assignment]
    strides = params["strides"] or (1,) * len(shape)
    starts, ends = params["start_indices"], params["limit_indices"]
    cut = [
        axis
        for axis, size in enumerate(shape)
        if not (_same(starts[axis], 0) and _same(ends[axis], size) and strides[axis] == 1)
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
    x = writer.whole(x, _shape_of(equation))  # type: ignore[assignment]
    names = writer.graph.add_several(
        "Split", len(sizes), x.name, writer.graph.integers(sizes), axis=x.order.index(axis)
    )
    return [Tensor(name, x.order, v.aval.shape) for name, v in zip(names, equation.outvars, strict=True)]


@rule("pad")
def _pad(writer: Writer, equation: Any, x: Tensor, fill: Value) -> Tensor:
    """Write zeros, or another constant, around a value; where the number is negative, something is cut off."""
    config, shape = equation.params["padding_config"], _shape_of(equation)
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
    old, new = _shape_of(equation), equation.outvars[0].aval.shape
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
        while not _same(size, target):
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
