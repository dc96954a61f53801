"""Initial values, drawn on the host with one numpy generator per parameter (`Traced.init`).

Every parameter carries the rule that draws it as metadata, so that a network is initialized without
compiling: ResNet-110 x 5 takes a second instead of the 24 s of `jax.jit(module.init)`.
"""

import concurrent.futures
import dataclasses
import math
import os
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax import lax

Array = jax.Array
Initializer = Callable[[Any, tuple[int, ...], Any], Any]  # (unused key, shape, dtype) -> boxed shape


@dataclasses.dataclass(frozen=True)
class Rule:
    """The distribution from which the host draws a parameter.

    Attributes:
        kind: "constant", "normal" (mean 0) or "uniform" (mean 0).
        size: the constant, the standard deviation or the bound.
    """

    kind: str
    size: float

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Draw an array, in pieces: NumPy draws float64, and a large kernel should not need that memory."""
        values = np.full(shape, self.size, dtype)
        flat = values.reshape(-1)
        for start in range(0, flat.size if self.kind != "constant" else 0, 2**18):
            part = flat[start : start + 2**18]
            if self.kind == "normal":
                part[:] = generator.normal(0.0, self.size, part.size)
            else:
                part[:] = generator.uniform(-self.size, self.size, part.size)
        return values


@jax.tree_util.register_pytree_node_class
class Ruled(meta.AxisMetadata[Any]):
    """A parameter's shape boxed with its rule, while shapes are evaluated."""

    def __init__(self, value: Any, rule: Rule):
        self.value, self.rule = value, rule

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Ruled":
        return Ruled(val, self.rule)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Ruled":
        return self  # each slice of a stacked parameter has the same rule

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Ruled":
        return self

    def tree_flatten(self) -> tuple[tuple[Any], Rule]:
        return (self.value,), self.rule

    @classmethod
    def tree_unflatten(cls, rule: Rule, children: tuple[Any]) -> "Ruled":
        return cls(children[0], rule)


def constant(value: float) -> Initializer:
    """Return the initializer that sets every element to `value`."""
    return lambda key, shape, dtype: Ruled(lax.empty(shape, dtype), Rule("constant", value))


def uniform(bound: float) -> Initializer:
    """Return the initializer U(-bound, bound)."""
    return lambda key, shape, dtype: Ruled(lax.empty(shape, dtype), Rule("uniform", bound))


def xavier_normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """Initialize a kernel (..., I, O) by N(0, 2 / (fan_in + fan_out)): torch.nn.init.xavier_normal_."""
    fans = math.prod(shape[:-2]) * (shape[-2] + shape[-1])
    return Ruled(lax.empty(shape, dtype), Rule("normal", math.sqrt(2 / fans)))


def kaiming_fan_out(key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """Initialize a kernel (k, k, I, O) by N(0, 2 / (k k O)): PyTorch's kaiming_normal_(mode="fan_out").

    Papers write its standard deviation sqrt(2 / n) with n = k k O.
    """
    fan_out = math.prod(shape[:-2]) * shape[-1]
    return Ruled(lax.empty(shape, dtype), Rule("normal", math.sqrt(2 / fan_out)))


def kaiming_fan_in(key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """Initialize a kernel (k, k, I, O) by N(0, 2 / (k k I)): PyTorch's kaiming_normal_ by default."""
    return Ruled(lax.empty(shape, dtype), Rule("normal", math.sqrt(2 / math.prod(shape[:-1]))))


def normal(std: float) -> Initializer:
    """Return the initializer N(0, std^2)."""
    return lambda key, shape, dtype: Ruled(lax.empty(shape, dtype), Rule("normal", std))


def torch_default(key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """Initialize a kernel (..., I, O) by U(-b, b), b = 1/sqrt(fan_in): PyTorch's default for layers."""
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return Ruled(lax.empty(shape, dtype), Rule("uniform", bound))


class Traced(NamedTuple):
    """A module that was traced, with nothing computed or compiled.

    Attributes:
        outputs: shapes and dtypes of the module's outputs.
        variables: shapes and dtypes of its variables, those of this package's layers boxed with their
            rules (`Ruled`).
        jaxpr: of the initialization and the forward pass.
        flax_init: jitted function of a key that returns the variables that have no rule, by their paths,
            as Flax initializes them.
    """

    outputs: Any
    variables: Any
    jaxpr: Any
    flax_init: Callable[[Array], dict[str, Array]]

    def init(self, seed: int | None, name: str) -> Any:
        """Return the initial variables as plain nested dicts of numpy arrays.

        Every value depends only on `seed`, on its own path and on `name` (where the module stands in the
        network), so adding a student or a layer does not change the others. Variables without a rule, of
        plain Linen layers, are initialized by Flax.

        Args:
            seed: any non-negative integer. With None nothing is drawn and shapes are returned.
            name: prefix of the paths, for example "students/2".

        Returns:
            `{"params": ..., "batch_stats": ...}`, without empty collections.
        """
        leaves, tree = jax.tree_util.tree_flatten_with_path(self.variables, _is_ruled)
        if seed is None:
            shapes = [leaf.unbox() if _is_ruled(leaf) else leaf for _, leaf in leaves]
            return jax.tree.unflatten(tree, shapes)
        by_flax: dict[str, np.ndarray] = {}
        if not all(_is_ruled(leaf) for _, leaf in leaves):
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
            by_flax = jax.device_get(self.flax_init(key))

        def value(path: Any, leaf: Any) -> Any:
            where = jax.tree_util.keystr(path)
            if not _is_ruled(leaf):
                return by_flax[where]
            generator = np.random.default_rng([seed, zlib.crc32(f"{name}{where}".encode())])
            return leaf.rule.draw(generator, leaf.value.shape, leaf.value.dtype)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            return jax.tree.unflatten(
                tree, threads.map(value, *zip(*leaves, strict=True)) if leaves else []
            )


def _is_ruled(leaf: Any) -> bool:
    return isinstance(leaf, Ruled)


def trace(module: nn.Module, *args: Any) -> Traced:
    """Trace `module` called with `args`, which are arrays or `jax.ShapeDtypeStruct`."""

    def call(*args: Any) -> Any:
        return module.init_with_output(jax.random.key(0), *args)

    def flax_init(key: Array) -> dict[str, Array]:
        variables = module.init(key, *jax.tree.map(_zeros, args))
        leaves = jax.tree_util.tree_leaves_with_path(variables, is_leaf=_is_ruled)
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if not _is_ruled(leaf)}

    jaxpr, (outputs, variables) = jax.make_jaxpr(call, return_shape=True)(*args)
    return Traced(outputs, variables, jaxpr.jaxpr, jax.jit(flax_init))


def _zeros(like: Any) -> Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), like.shape)
    return jnp.zeros(like.shape, like.dtype)
