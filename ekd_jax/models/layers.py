"""The layers every family is built from: convolution, batch norm, linear, dropout, pooling.

Arrays are NHWC and kernels HWIO throughout. Parameters, batch statistics and the classifier's logits
are float32 always, whatever convolutions compute in.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from ekd_jax.models.convolution import convolution
from ekd_jax.models.initializers import Initializer, constant, kaiming_fan_out, torch_default, uniform

Array = jax.Array
Activation = Callable[[Array], Array]


@flax.struct.dataclass
class Mode:
    """How a forward pass is computed; the same for every layer of a network.

    Attributes:
        train: use the batch's statistics and update the running ones, drop out.
        dtype: what convolutions compute in, float32 or bfloat16.
        groups: batch norm takes the statistics of so many parts of the batch apart from each other.
        epsilon: added to batch norm's variance.
        rematerialize: the backward pass keeps what goes into blocks alone, and computes the rest again.
    """

    train: bool = flax.struct.field(pytree_node=False, default=False)
    dtype: Any = flax.struct.field(pytree_node=False, default=jnp.float32)
    groups: int = flax.struct.field(pytree_node=False, default=1)
    epsilon: float = flax.struct.field(pytree_node=False, default=1e-5)
    rematerialize: bool = flax.struct.field(pytree_node=False, default=False)


class Conv(nn.Module):
    """k x k convolution; kernel (k, k, C // groups, features), and a bias (features,) if it has a rule."""

    features: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    padding: str = "even"
    kernel_init: Initializer = kaiming_fan_out
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(mode.dtype)
        x = convolution(x.astype(mode.dtype), kernel, self.stride, self.groups, self.padding)
        if self.bias_init is None:
            return x
        return x + self.param("bias", self.bias_init, (self.features,), jnp.float32).astype(mode.dtype)


def materialized(x: Array) -> Array:
    """x, computed once and written to memory.

    XLA for CPUs computes an elementwise result, and what it is made of, anew for every shape that it is
    wanted in: (B, H, W, C), pixels in a row, a few images at a time. It takes `lax.optimization_barrier`
    away before it decides that, but leaves a call alone that is not to be put inline.
    """
    if jax.default_backend() != "cpu":
        return x
    with set_xla_metadata(inlineable="false"):
        written: Array = jax.jit(lax.optimization_barrier)(x)
    return written


@jax.custom_vjp
def relu(x: Array) -> Array:
    """max(x, 0). Its gradient is read from what it gives, which the next convolution keeps anyway."""
    return materialized(jnp.maximum(x, 0))


relu.defvjp(lambda x: (relu(x),) * 2, lambda kept, g: (jnp.where(kept > 0, g, 0),))


Moments = tuple[Array, Array]


def moments(x: Array, mode: Mode) -> Moments | None:
    """Mean and variance over all axes but the last, each (groups, 1, ..., 1, C) float32, as constants;
    None outside of training, where running ones take their place."""
    if not mode.train:
        return None
    y = lax.stop_gradient(_grouped(x, mode))
    axes = tuple(range(1, y.ndim - 1))
    mean = y.mean(axes, keepdims=True)
    return mean, jnp.maximum((y * y).mean(axes, keepdims=True) - mean * mean, 0.0)  # one pass over y


def _grouped(x: Array, mode: Mode) -> Array:
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return y.reshape(mode.groups, -1, *x.shape[1:]) if mode.train else y


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def normalized(x: Array, mean: Array, var: Array, scale: Array, bias: Array, mode: Mode) -> Array:
    """Batch norm with the moments of x itself, whose gradient goes through them to x.

    It is written out, and begins from x: two sums in one pass, and one more pass. Autodiff would keep
    several arrays of x's size, and go over them more often.

    Args:
        x: (B, ..., C).
        mean, var: its `moments`.
        scale, bias: (C,).
        mode: of the layer.

    Returns:
        (B, ..., C) in x's dtype.
    """
    gain = scale * lax.rsqrt(var + mode.epsilon)
    return (_grouped(x, mode) * gain + (bias - mean * gain)).reshape(x.shape).astype(x.dtype)


def _normalized_forward(
    x: Array, mean: Array, var: Array, scale: Array, bias: Array, mode: Mode
) -> tuple[Array, tuple[Array, ...]]:
    return normalized(x, mean, var, scale, bias, mode), (x, mean, var, scale)


def _normalized_backward(mode: Mode, kept: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    x, mean, var, scale = kept
    x_, g_ = _grouped(x, mode), _grouped(g, mode)
    axes, count = tuple(range(1, x_.ndim - 1)), math.prod(x_.shape[1:-1])
    rate = lax.rsqrt(var + mode.epsilon)
    whole = g_.sum(axes, keepdims=True)
    along = ((g_ * x_).sum(axes, keepdims=True) - mean * whole) * rate
    gain = scale * rate
    slope = -gain * rate * along / count
    dx = gain * g_ + (slope * x_ - (slope * mean + gain * whole / count))
    per_channel = along.reshape(-1, x.shape[-1]).sum(0), whole.reshape(-1, x.shape[-1]).sum(0)
    return materialized(dx.reshape(x.shape).astype(x.dtype)), None, None, *per_channel


normalized.defvjp(_normalized_forward, _normalized_backward)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, as PyTorch's: running variance unbiased.

    Under `jax.jit` over a mesh the statistics are those of the global batch: the means below run over
    all devices. With `mode.groups` parts, one a device, each part has its own, no layer waits for
    other devices, and the running values move towards the parts' mean. Computes in float32 and returns x's
    dtype. `known` are x's `moments`, where they need not be computed again.
    """

    momentum: float = 0.9  # of the old running value; PyTorch calls 0.1 the momentum

    @nn.compact
    def __call__(self, x: Array, mode: Mode, known: Moments | None = None) -> Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", constant(1.0), shape, jnp.float32)
        bias = self.param("bias", constant(0.0), shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", constant(0.0), None, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", constant(1.0), None, shape, jnp.float32)
        found = known or moments(x, mode)
        if found is None:
            gain = scale * lax.rsqrt(running_var.value + mode.epsilon)
            return (_grouped(x, mode) * gain + (bias - running_mean.value * gain)).astype(x.dtype)
        if not self.is_initializing():
            count = math.prod(x.shape[:-1]) // mode.groups
            keep, unbiased = self.momentum, count / max(count - 1, 1)
            means, variances = (v.reshape(mode.groups, -1).mean(0) for v in found)
            running_mean.value = keep * running_mean.value + (1 - keep) * means
            running_var.value = keep * running_var.value + (1 - keep) * unbiased * variances
        return normalized(x, *found, scale, bias, mode)


class ConvNorm(nn.Module):
    """Convolution, batch norm, activation."""

    features: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    padding: str = "even"
    kernel_init: Initializer = kaiming_fan_out
    activation: Activation = relu

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        conv = Conv(
            self.features, self.size, self.stride, self.groups, self.padding, self.kernel_init, name="conv"
        )
        return self.activation(BatchNorm(name="bn")(conv(x, mode), mode))


class Linear(nn.Module):
    """Linear layer with bias on the last axis; kernel (C, features)."""

    features: int
    kernel_init: Initializer = torch_default
    bias_init: Initializer | None = None  # U(+-1/sqrt(C)), PyTorch's default, if not given
    dtype: Any = None  # to compute in; float32 (or float64 for float64 input) if not given

    @nn.compact
    def parameters(self, fan_in: int) -> tuple[Array, Array]:
        """Kernel and bias, float32."""
        kernel = self.param("kernel", self.kernel_init, (fan_in, self.features), jnp.float32)
        bias_init = self.bias_init or uniform(1 / math.sqrt(fan_in))
        return kernel, self.param("bias", bias_init, (self.features,), jnp.float32)

    def __call__(self, x: Array) -> Array:
        fan_in = x.shape[-1]
        kernel, bias = self.parameters(fan_in)
        dtype = self.dtype or jnp.promote_types(x.dtype, jnp.float32)
        flat = x.astype(dtype).reshape(-1, fan_in)  # of more axes the gradient would be transposed first
        return (flat @ kernel.astype(dtype) + bias.astype(dtype)).reshape(*x.shape[:-1], self.features)


class Dropout(nn.Module):
    """Sets values to zero at `rate` in training and scales the rest up by 1 / (1 - rate).

    Dropout, or stochastic depth with whole=True: an example as a whole (Huang et al. 2016). Which ones
    is a function of (seed, step, student, place in the network), by the key that `Ensemble.apply` gets.
    """

    rate: float
    whole: bool = False

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        if not mode.train or self.rate == 0 or self.is_initializing():
            return x
        shape = (x.shape[0], *[1] * (x.ndim - 1)) if self.whole else x.shape
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros((), x.dtype))


def max_pool(x: Array, size: int, stride: int) -> Array:
    """(B, H, W, C), padded like PyTorch's `padding=(size-1)//2`."""
    pad = ((size - 1) // 2,) * 2
    return nn.max_pool(x, (size, size), (stride, stride), (pad, pad))


def average_pool(x: Array, size: int, stride: int) -> Array:
    """(B, H, W, C), padded likewise with zeros that count."""
    pad = ((size - 1) // 2,) * 2
    return nn.avg_pool(x, (size, size), (stride, stride), (pad, pad))


def global_pool(x: Array) -> Array:
    """(B, H, W, C) -> (B, C), the mean in float32."""
    return x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
