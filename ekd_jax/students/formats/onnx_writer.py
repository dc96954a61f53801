"""A JAX program as an ONNX graph: equation by equation, each by the rule of its operation.

The rules are in `onnx_rules.py` and `onnx_shapes.py`. ONNX computes convolutions on (B, C, H, W), JAX programs here on
(B, H, W, C). A value therefore knows in which order its axes are stored, and is transposed only where an operation
needs another order.
"""

import dataclasses
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
        if constant and not is_symbolic(equation.outvars):
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
        need(all(same(a, b) for a, b in zip(value.shape, shape, strict=True)), "a value that is repeated")
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
            next((size[axis] for size in sizes if len(size) == rank and not same(size[axis], 1)), 1)
            for axis in range(rank)
        )
        return Tensor(self.graph.add(op, *names, **attributes), first.order, shape)


def need(condition: Any, otherwise: str) -> None:
    """Raise UnsupportedError with the words `otherwise` unless a condition holds."""
    if not condition:
        raise UnsupportedError(otherwise)


def is_symbolic(variables: Sequence[Any]) -> bool:
    """Return whether a variable has an axis whose size is not known, that of the images."""
    return any(
        not isinstance(n, int) for variable in variables for n in getattr(variable.aval, "shape", ())
    )


def same(a: Any, b: Any) -> bool:
    """Return whether two sizes are equal; each may be symbolic."""
    return a is b or bool(a == b)


def is_float(equation: Any) -> bool:
    """Return whether the first input of an equation is a floating-point number."""
    return bool(jnp.issubdtype(equation.invars[0].aval.dtype, jnp.floating))


def shape_of(equation: Any, place: int = 0) -> tuple[Any, ...]:
    """Return the shape of an input of an equation, as the program has it."""
    shape: tuple[Any, ...] = equation.invars[place].aval.shape
    return shape
