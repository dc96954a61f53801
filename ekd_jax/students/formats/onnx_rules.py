"""Rules for operations that compute: element by element, and the layers."""

import dataclasses
import math
from typing import Any

import numpy as np

from ekd_jax.students.formats.onnx_writer import (
    ALIKE,
    NCHW,
    Tensor,
    UnsupportedError,
    Value,
    Writer,
    is_float,
    need,
    rule,
    shape_of,
)


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
    "sign": "Sign",
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


@rule("is_finite")
def _is_finite(writer: Writer, equation: Any, x: Tensor) -> Tensor:
    # Infinity minus infinity is no number, and no number equals 0. ONNX's IsInf knows fewer types.
    return writer.elementwise("Equal", writer.elementwise("Sub", x, x), np.array(0, np.float32))


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
        writer.stored(writer.whole(x, shape_of(equation)), NCHW),
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
    need(not sums or is_float(equation), "integers")
    window, strides, pads = (params[k] for k in ("window_dimensions", "window_strides", "padding"))
    need(len(window) == 4 and window[0] == window[3] == 1, "a window over images or channels")
    need({*params["base_dilation"], *params["window_dilation"]} == {1}, "a dilated window")
    name = writer.graph.add(
        "AveragePool" if sums else "MaxPool",
        writer.stored(writer.whole(x, shape_of(equation)), NCHW),
        kernel_shape=window[1:3],
        strides=strides[1:3],
        pads=(pads[1][0], pads[2][0], pads[1][1], pads[2][1]),
        **({"count_include_pad": 1} if sums else {}),
    )
    scale = float(math.prod(window)) if sums else 1.0
    return Tensor(name, NCHW, equation.outvars[0].aval.shape, scale)


@rule("reduce_sum", "reduce_max", "reduce_min")
def _reduce(writer: Writer, equation: Any, x: Tensor) -> Tensor:
    axes, shape = equation.params["axes"], shape_of(equation)
    x = writer.whole(x, shape)  # type: ignore[assignment]
    kept = [axis for axis in x.order if axis not in axes]
    order = tuple(sorted(kept).index(axis) for axis in kept)
    places = sorted(x.order.index(axis) for axis in axes)
    kind = {"reduce_sum": "ReduceMean", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}
    name = writer.graph.add(kind[equation.primitive.name], x.name, axes=places, keepdims=0)
    scale = 1.0
    if equation.primitive.name == "reduce_sum":
        need(is_float(equation), "integers")
        sizes = [shape[axis] for axis in axes]
        need(all(isinstance(n, int) for n in sizes), "a sum over images")
        scale = float(math.prod(sizes))
    return Tensor(name, order, equation.outvars[0].aval.shape, scale)


@rule("dot_general")
def _matrix_product(writer: Writer, equation: Any, a: Value, b: Value) -> Tensor:
    """Write a product of matrices; axes that both share come first, as in `jnp.matmul`."""
    (last_a, last_b), (shared_a, shared_b) = equation.params["dimension_numbers"]
    need(len(last_a) == len(last_b) == 1, "a sum over several axes")
    ranks = len(shape_of(equation, 0)), len(shape_of(equation, 1))
    free_a, free_b = (
        [axis for axis in range(rank) if axis not in (*last, *shared)]
        for rank, last, shared in zip(ranks, (last_a, last_b), (shared_a, shared_b), strict=True)
    )
    need(len(free_b) == 1 and (len(free_a) == 1 or not shared_a), "a product of more than matrices")
    a, b = (writer.whole(value, shape_of(equation, place)) for place, value in enumerate((a, b)))
    left = writer.stored(a, (*shared_a, *free_a, *last_a))
    right = writer.stored(b, (*shared_b, *last_b, *free_b))
    shape = equation.outvars[0].aval.shape
    return Tensor(writer.graph.add("MatMul", left, right), tuple(range(len(shape))), shape)
