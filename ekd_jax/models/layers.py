"""The layers every family is built from: convolution, batch norm, linear.

Arrays are NHWC and kernels HWIO throughout. Parameters are float32; `dtype` is what convolutions
compute in (float32 or bfloat16). Batch statistics and the classifier's logits are float32 always.

Initial values are drawn on the host, one numpy generator a parameter (`initialise`). Every
parameter carries the rule that draws it as metadata, so that nothing has to be compiled to get a
network: ResNet-110 x 5 takes a second instead of the 24 s of `jax.jit(module.init)`.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax import lax

Array = jax.Array
Initializer = Callable[[Any, tuple[int, ...], Any], Any]  # (unused key, shape, dtype) -> boxed zeros


# --- initial values --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the host draws a parameter: a constant, a centred normal or a centred uniform."""

    kind: str
    size: float

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        match self.kind:
            case "normal":
                return generator.normal(0.0, self.size, shape)
            case "uniform":
                return generator.uniform(-self.size, self.size, shape)
        return np.full(shape, self.size)


@jax.tree_util.register_pytree_node_class
class Ruled(meta.AxisMetadata[Any]):
    """A parameter's shape boxed with its rule; exists only while shapes are evaluated."""

    def __init__(self, value: Any, rule: Rule):
        self.value, self.rule = value, rule

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Ruled":
        return Ruled(val, self.rule)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Ruled":
        return self  # each slice of a stacked parameter is drawn by the same rule

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Ruled":
        return self

    def tree_flatten(self) -> tuple[tuple[Any], Rule]:
        return (self.value,), self.rule

    @classmethod
    def tree_unflatten(cls, rule: Rule, children: tuple[Any]) -> "Ruled":
        return cls(children[0], rule)


def constant(value: float) -> Initializer:
    """Every element `value`."""
    return lambda key, shape, dtype: Ruled(jnp.zeros(shape, dtype), Rule("constant", value))


def uniform(bound: float) -> Initializer:
    """U(-bound, bound)."""
    return lambda key, shape, dtype: Ruled(jnp.zeros(shape, dtype), Rule("uniform", bound))


def xavier_normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """N(0, 2 / (fan_in + fan_out)) for a kernel (..., I, O), as torch.nn.init.xavier_normal_."""
    fans = math.prod(shape[:-2]) * (shape[-2] + shape[-1])
    return Ruled(jnp.zeros(shape, dtype), Rule("normal", math.sqrt(2 / fans)))


def torch_default(key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """U(-b, b), b = 1/sqrt(fan_in), for a kernel (..., I, O): PyTorch's default for conv and linear."""
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return Ruled(jnp.zeros(shape, dtype), Rule("uniform", bound))


def initialise(module: nn.Module, seed: int, *args: Any, name: str = "", **kwargs: Any) -> Any:
    """The initial variables of `module`, as numpy arrays in plain nested dicts.

    Every value depends on `seed`, on its own path and on `name` (where the module stands in the
    network) alone, so adding a student or a layer does not change the others.

    Args:
        module: a Linen module whose parameters are made with the initialisers of this file.
        seed: any non-negative integer.
        *args, **kwargs: what the module is called with; arrays or `jax.ShapeDtypeStruct`.
        name: prefix of the paths, for example "students/2".

    Returns:
        `{"params": ..., "batch_stats": ...}`, empty collections left out.
    """
    shapes = jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a, **kwargs), *args)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        rule, shape = (leaf.rule, leaf.value) if isinstance(leaf, Ruled) else (None, leaf)
        if rule is None:
            raise TypeError(f"{jax.tree_util.keystr(path)} was not made by an initialiser of layers.py")
        where = zlib.crc32(f"{name}{jax.tree_util.keystr(path)}".encode())
        return rule.draw(np.random.default_rng([seed, where]), shape.shape).astype(shape.dtype)

    is_ruled = lambda leaf: isinstance(leaf, Ruled)  # noqa: E731
    return jax.tree_util.tree_map_with_path(draw, shapes, is_leaf=is_ruled)


# --- convolution -----------------------------------------------------------------------------

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolution(x: Array, kernel: Array, stride: int = 1, groups: int = 1) -> Array:
    """2-D convolution padded like PyTorch's `padding=(k-1)//2`.

    On CPU the gradient is written out as two convolutions in the layouts XLA is fast at: inside
    loops it does not bring them there by itself, and steps take 15 to 30 times longer.

    Args:
        x: (B, H, W, C).
        kernel: (h, w, C // groups, K), h and w odd.
        stride: of both axes.
        groups: feature groups.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), K) in x's dtype.
    """
    if groups == 1 and jax.default_backend() == "cpu":
        return _canonical_convolution(x, kernel, stride)
    return _convolution(x, kernel, stride, groups)


def _convolution(x: Array, kernel: Array, stride: int, groups: int) -> Array:
    padding = [((k - 1) // 2, (k - 1) // 2) for k in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT, feature_group_count=groups
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _canonical_convolution(x: Array, kernel: Array, stride: int) -> Array:
    return _convolution(x, kernel, stride, groups=1)


def _forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _canonical_convolution(x, kernel, stride), (x, kernel)


def _backward(stride: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    sizes = [
        (k, n, (m - 1) * stride + 1)
        for k, n, m in zip(kernel.shape, x.shape[1:3], g.shape[1:3], strict=False)
    ]
    # d/dx: the gradient, spread by the stride, with the kernel turned round.
    low = [k - 1 - (k - 1) // 2 for k, _, _ in sizes]
    dx = lax.conv_general_dilated(
        g,
        jnp.flip(kernel, (0, 1)).swapaxes(2, 3),
        (1, 1),
        [(p, n + k - 1 - p - m) for p, (k, n, m) in zip(low, sizes, strict=True)],
        lhs_dilation=(stride, stride),
        dimension_numbers=_LAYOUT,
    )
    # d/dkernel: x as C,H,W,B against the gradient as H,W,B,K.
    low = [(k - 1) // 2 for k, _, _ in sizes]
    dkernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        g.transpose(1, 2, 0, 3),
        (1, 1),
        [(p, k - 1 + m - n - p) for p, (k, n, m) in zip(low, sizes, strict=True)],
        rhs_dilation=(stride, stride),
        dimension_numbers=_LAYOUT,
    )
    return dx, dkernel.transpose(1, 2, 0, 3)


_canonical_convolution.defvjp(_forward, _backward)


# --- modules ---------------------------------------------------------------------------------


class Conv(nn.Module):
    """k x k convolution without bias; kernel (k, k, C, features)."""

    features: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    dtype: Any = jnp.float32
    kernel_init: Initializer = xavier_normal

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        return convolution(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.groups)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, as PyTorch's: eps 1e-5, running variance unbiased.

    The statistics are those of the global batch: under `jax.jit` over a mesh the means below run
    over all devices. Computes in float32 and returns x's dtype.
    """

    momentum: float = 0.9  # of the old running value; PyTorch calls 0.1 the momentum
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", constant(1.0), shape, jnp.float32)
        bias = self.param("bias", constant(0.0), shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", constant(0.0), None, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", constant(1.0), None, shape, jnp.float32)
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = y.mean(axes)
            var = jnp.maximum((y * y).mean(axes) - mean * mean, 0.0)  # one pass over y
            if not self.is_initializing():
                count = math.prod(x.shape[:-1])
                keep, unbiased = self.momentum, count / max(count - 1, 1)
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * unbiased * var
        else:
            mean, var = running_mean.value, running_var.value
        gain = scale * lax.rsqrt(var + self.epsilon)
        return (y * gain + (bias - mean * gain)).astype(x.dtype)


class Linear(nn.Module):
    """Linear layer with bias on the last axis; kernel (C, features), bias U(+-1/sqrt(C))."""

    features: int
    kernel_init: Initializer = xavier_normal
    dtype: Any = None  # to compute in; float32 (or float64 for float64 input) if not given

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fan_in = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (fan_in, self.features), jnp.float32)
        bias = self.param("bias", uniform(1 / math.sqrt(fan_in)), (self.features,), jnp.float32)
        dtype = self.dtype or jnp.promote_types(x.dtype, jnp.float32)
        return x.astype(dtype) @ kernel.astype(dtype) + bias.astype(dtype)
