"""The layers that every family is built from: convolution, batch norm, linear, dropout, pooling.

Arrays are NHWC and kernels HWIO. Parameters, batch statistics and the classifier's logits are always
float32, whatever dtype convolutions compute in.
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
from ekd_jax.models.platform import platform

Array = jax.Array
Activation = Callable[[Array], Array]


@flax.struct.dataclass
class Mode:
    """The mode of a forward pass, shared by every layer of a network.

    Attributes:
        train: whether batch norm uses the batch's statistics and updates the running ones, and whether
            dropout drops.
        dtype: dtype that convolutions compute in, float32 or bfloat16.
        groups: number of parts of the batch that batch norm normalizes separately.
        epsilon: added to the variance in batch norm.
        rematerialize: whether the backward pass keeps only each block's input and recomputes the rest.
    """

    train: bool = flax.struct.field(pytree_node=False, default=False)
    dtype: Any = flax.struct.field(pytree_node=False, default=jnp.float32)
    groups: int = flax.struct.field(pytree_node=False, default=1)
    epsilon: float = flax.struct.field(pytree_node=False, default=1e-5)
    rematerialize: bool = flax.struct.field(pytree_node=False, default=False)


class Conv(nn.Module):
    """A k x k convolution: kernel (k, k, C // groups, features), bias (features,) if `bias_init` is set."""

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


def materialize(x: Array) -> Array:
    """Return x and make XLA for CPUs compute it once and write it to memory.

    XLA recomputes an elementwise result, and its inputs, for every shape in which it is used: (B, H, W, C),
    pixels in a row, a few images at a time. It removes `lax.optimization_barrier` before it decides
    that, but it does not look into a call that must not be inlined.
    """
    if platform() != "cpu":
        return x
    with set_xla_metadata(inlineable="false"):
        written: Array = jax.jit(lax.optimization_barrier)(x)
    return written


@jax.custom_vjp
def relu(x: Array) -> Array:
    """Return max(x, 0). The gradient is computed from the output, which the next convolution keeps anyway."""
    return materialize(jnp.maximum(x, 0))


relu.defvjp(lambda x: (relu(x),) * 2, lambda kept, g: (jnp.where(kept > 0, g, 0),))


Moments = tuple[Array, Array]


def moments(x: Array, mode: Mode) -> Moments | None:
    """Return mean and variance over all axes but the last, each (groups, 1, ..., 1, C) float32.

    They are constants to autodiff. In evaluation the result is None, as running statistics are used.
    """
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
def batch_normalize(x: Array, mean: Array, var: Array, scale: Array, bias: Array, mode: Mode) -> Array:
    """Normalize x by its own moments; the gradient with respect to x includes their dependence on x.

    The gradient is written out: it starts from x and takes one pass for two sums and a second pass.
    Autodiff would keep several arrays of x's size and pass over them more often.

    Args:
        x: (B, ..., C).
        mean, var: the `moments` of x.
        scale, bias: (C,).
        mode: how the layer computes.

    Returns:
        (B, ..., C) in x's dtype.
    """
    gain = scale * lax.rsqrt(var + mode.epsilon)
    return (_grouped(x, mode) * gain + (bias - mean * gain)).reshape(x.shape).astype(x.dtype)


def _batch_normalize_forward(
    x: Array, mean: Array, var: Array, scale: Array, bias: Array, mode: Mode
) -> tuple[Array, tuple[Array, ...]]:
    return batch_normalize(x, mean, var, scale, bias, mode), (x, mean, var, scale)


def _batch_normalize_backward(mode: Mode, kept: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    x, mean, var, scale = kept
    x_, g_ = _grouped(x, mode), _grouped(g, mode)
    axes, count = tuple(range(1, x_.ndim - 1)), math.prod(x_.shape[1:-1])
    rate = lax.rsqrt(var + mode.epsilon)
    dbias = g_.sum(axes, keepdims=True)
    dscale = ((g_ * x_).sum(axes, keepdims=True) - mean * dbias) * rate
    gain = scale * rate
    slope = -gain * rate * dscale / count
    dx = gain * g_ + (slope * x_ - (slope * mean + gain * dbias / count))
    per_channel = dscale.reshape(-1, x.shape[-1]).sum(0), dbias.reshape(-1, x.shape[-1]).sum(0)
    return materialize(dx.reshape(x.shape).astype(x.dtype)), None, None, *per_channel


batch_normalize.defvjp(_batch_normalize_forward, _batch_normalize_backward)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, as in PyTorch: the running variance is unbiased.

    Under `jax.jit` over a mesh the statistics are those of the global batch, because the means below run
    over all devices. With `mode.groups` parts, one per device, each part has its own statistics, no layer
    waits for other devices, and the running statistics move towards the mean of the parts. It computes in
    float32 and returns x's dtype. The caller may pass x's `moments` if it has them already.
    """

    momentum: float = 0.9  # the share of the old running value; PyTorch's momentum is 0.1

    @nn.compact
    def __call__(self, x: Array, mode: Mode, x_moments: Moments | None = None) -> Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", constant(1.0), shape, jnp.float32)
        bias = self.param("bias", constant(0.0), shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", constant(0.0), None, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", constant(1.0), None, shape, jnp.float32)
        x_moments = x_moments or moments(x, mode)
        if x_moments is None:
            gain = scale * lax.rsqrt(running_var.value + mode.epsilon)
            return (_grouped(x, mode) * gain + (bias - running_mean.value * gain)).astype(x.dtype)
        if not self.is_initializing():
            count = math.prod(x.shape[:-1]) // mode.groups
            keep, unbiased = self.momentum, count / max(count - 1, 1)
            means, variances = (v.reshape(mode.groups, -1).mean(0) for v in x_moments)
            running_mean.value = keep * running_mean.value + (1 - keep) * means
            running_var.value = keep * running_var.value + (1 - keep) * unbiased * variances
        return batch_normalize(x, *x_moments, scale, bias, mode)


class ConvNorm(nn.Module):
    """A convolution, batch norm and an activation."""

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
    """A linear layer with bias on the last axis: kernel (C, features).

    Attributes:
        features: number of outputs.
        kernel_init: initializer of the kernel.
        bias_init: initializer of the bias. None means U(-1/sqrt(C), 1/sqrt(C)), PyTorch's default.
        dtype: dtype to compute in. None means float32, or float64 for float64 input.
    """

    features: int
    kernel_init: Initializer = torch_default
    bias_init: Initializer | None = None
    dtype: Any = None

    @nn.compact
    def parameters(self, fan_in: int) -> tuple[Array, Array]:
        """Return kernel and bias, float32, for `fan_in` inputs."""
        kernel = self.param("kernel", self.kernel_init, (fan_in, self.features), jnp.float32)
        bias_init = self.bias_init or uniform(1 / math.sqrt(fan_in))
        return kernel, self.param("bias", bias_init, (self.features,), jnp.float32)

    def __call__(self, x: Array) -> Array:
        fan_in = x.shape[-1]
        kernel, bias = self.parameters(fan_in)
        dtype = self.dtype or jnp.promote_types(x.dtype, jnp.float32)
        flat = x.astype(dtype).reshape(-1, fan_in)  # with more axes XLA would transpose for the gradient
        return (flat @ kernel.astype(dtype) + bias.astype(dtype)).reshape(*x.shape[:-1], self.features)


class Dropout(nn.Module):
    """In training, set values to zero at `rate` and divide the others by 1 - rate.

    With whole_examples=True all values of an example are dropped together, which is stochastic depth
    (Huang et al. 2016). What is dropped is a function of (seed, step, student, place in the network),
    through the key passed to `Ensemble.apply`.
    """

    rate: float
    whole_examples: bool = False

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        if not mode.train or self.rate == 0 or self.is_initializing():
            return x
        shape = (x.shape[0], *[1] * (x.ndim - 1)) if self.whole_examples else x.shape
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros((), x.dtype))


def max_pool(x: Array, size: int, stride: int) -> Array:
    """Pool (B, H, W, C) with PyTorch's `padding=(size-1)//2`."""
    pad = ((size - 1) // 2,) * 2
    return nn.max_pool(x, (size, size), (stride, stride), (pad, pad))


def average_pool(x: Array, size: int, stride: int) -> Array:
    """Pool (B, H, W, C) with PyTorch's `padding=(size-1)//2`, whose zeros are part of the average."""
    pad = ((size - 1) // 2,) * 2
    return nn.avg_pool(x, (size, size), (stride, stride), (pad, pad))


def global_pool(x: Array) -> Array:
    """Average (B, H, W, C) over pixels in float32; returns (B, C)."""
    return x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
