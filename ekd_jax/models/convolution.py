"""2-D convolution with PyTorch's or TensorFlow's padding, in the form that is fast on each backend.

XLA for CPUs uses its fast layout only outside of loops; inside, steps take 15 to 30 times longer, and the
gradient of grouped convolutions is slower still. Gradients and grouped convolutions are therefore written
out for CPUs. The measurements are in docs/decisions.md.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.models.platform import platform

Array = jax.Array

Pads = tuple[tuple[int, int], tuple[int, int]]  # zeros above and below, left and right

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolution(x: Array, kernel: Array, stride: int = 1, groups: int = 1, padding: str = "even") -> Array:
    """Convolve x, padded with zeros, with a kernel.

    Args:
        x: (B, H, W, C).
        kernel: (h, w, C // groups, K), h and w odd.
        stride: stride of both axes.
        groups: number of groups of channels that are convolved separately.
        padding: "even" pads (k - 1) // 2 on every side, as PyTorch networks do. "same" is TensorFlow's: it pads
            max((ceil(n / stride) - 1) * stride + k - n, 0) to an axis of size n, the odd pixel at its end.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), K) in x's dtype.
    """
    rows, columns = (_pads(n, k, stride, padding) for n, k in zip(x.shape[1:3], kernel.shape, strict=False))
    pads = rows, columns
    if platform() != "cpu":
        return _convolution(x, kernel, stride, groups, pads)
    if groups == 1:
        return _canonical_convolution(x, kernel, stride, pads)
    return grouped_convolution(x, kernel, stride, groups, pads)


def _pads(n: int, k: int, stride: int, padding: str) -> tuple[int, int]:
    """Return the zeros before and after an axis of size n, for a kernel of size k."""
    if padding == "even":
        return (k - 1) // 2, (k - 1) // 2
    total = max((-(-n // stride) - 1) * stride + k - n, 0)
    return total // 2, total - total // 2


def _convolution(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=_LAYOUT, feature_group_count=groups
    )


# --- one group: sizes that are fast, the gradient as a convolution and as matrix products --------

SLOW_FEATURES = {*range(25, 32), *range(49, 64)}  # slower than the next multiple of 32
CACHE_BYTES = 2**21  # working set of the weight gradient: about a core's second-level cache


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _canonical_convolution(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    _, width, channels, features = kernel.shape
    pixels = 1
    if stride == 1 and width > 1 and sum(pads[1]) == width - 1:  # images keep their width
        pixels = 4 if features <= 4 else 2 if features <= 12 and channels % 2 == 0 else 1
    return fitted_convolution(x, kernel, stride, pads, math.gcd(pixels, x.shape[2]))


@partial(jax.jit, static_argnums=(2, 3, 4))
def fitted_convolution(x: Array, kernel: Array, stride: int, pads: Pads, pixels: int) -> Array:
    """Convolve in sizes at which XLA's CPU kernels are fast (docs/performance.md has the measurements).

    Few features leave most of a vector register empty. Those of `pixels` neighboring pixels are therefore
    computed as features of one pixel, by a kernel that is wider by pixels - 1, mostly zeros, and moves by
    `pixels`. More than 12 channels are padded to a multiple of 4, and `SLOW_FEATURES` to one of 32.

    It is a jitted function so that `cost` recognizes it in a jaxpr.
    """
    channels, features = kernel.shape[2:]
    if pixels > 1:
        spread = [(p, pixels - 1 - p) for p in range(pixels)]
        kernel = jnp.concatenate([jnp.pad(kernel, ((0, 0), s, (0, 0), (0, 0))) for s in spread], -1)
    outputs = pixels * features
    extra_channels = -channels % 4 if channels > 12 else 0
    extra_features = -outputs % 32 if outputs in SLOW_FEATURES else 0
    x = jnp.pad(x, (*[(0, 0)] * 3, (0, extra_channels)))
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, extra_channels), (0, extra_features)))
    strides = (stride, stride * pixels)
    y = lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_LAYOUT)[..., :outputs]
    return y.reshape(*y.shape[:2], -1, features)


def _forward(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return _canonical_convolution(x, kernel, stride, pads), (x, kernel)


def _backward(stride: int, pads: Pads, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    sizes = [
        (low, k, n, (m - 1) * stride + 1)
        for (low, _), k, n, m in zip(pads, kernel.shape, x.shape[1:3], g.shape[1:3], strict=False)
    ]
    # d/dx: the gradient, dilated by the stride, convolved with the flipped kernel.
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    rows, columns = ((k - 1 - low, n + low - m) for low, k, n, m in sizes)
    if stride == 1:
        dx = _canonical_convolution(g, flipped, 1, (rows, columns))
    else:
        dx = lax.conv_general_dilated(
            g,
            flipped,
            (1, 1),
            (rows, columns),
            lhs_dilation=(stride, stride),
            dimension_numbers=_LAYOUT,
        )
    return dx, _kernel_gradient(x, kernel.shape, stride, pads, g)


def _kernel_gradient(x: Array, shape: tuple[int, ...], stride: int, pads: Pads, g: Array) -> Array:
    """Return the gradient (h, w, C, K) of the kernel, computed a few images at a time to stay in the cache.

    Where devices share a batch all images are taken at once. Otherwise the devices would exchange the
    gradient of every few images.
    """
    batch, height, width, channels = x.shape
    image_bytes = x.dtype.itemsize * height * width * (shape[1] * channels + shape[0] * shape[3])
    size = math.gcd(batch, 2 ** int(math.log2(max(1, CACHE_BYTES // image_bytes))))
    if size == batch or shape[0] == shape[1] == 1 or jax.device_count() > 1:
        return _kernel_gradient_at_once(x, shape, stride, pads, g)

    def body(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        return total + _kernel_gradient_at_once(chunk[0], shape, stride, pads, chunk[1]), None

    chunks = tuple(v.reshape(-1, size, *v.shape[1:]) for v in (x, g))
    total, _ = lax.scan(body, jnp.zeros(shape, x.dtype), chunks)
    return total


def _kernel_gradient_at_once(x: Array, shape: tuple[int, ...], stride: int, pads: Pads, g: Array) -> Array:
    """Return the gradient of the kernel as matrix products.

    At every pixel the w columns of x that a row of the kernel covers are multiplied by the gradients of the
    h output rows that this pixel contributes to.
    """
    (h, w, channels, features), (_, rows, columns, _) = shape, g.shape
    (top, bottom), sides = pads
    if stride == 1:
        padded = jnp.pad(x, ((0, 0), (0, 0), sides, (0, 0)))
        seen = jnp.concatenate([padded[:, :, j : j + columns] for j in range(w)], -1)
        spread = jnp.pad(g, ((0, 0), (h - 1 - top, h - 1 - bottom), (0, 0), (0, 0)))
        gradients = jnp.concatenate([spread[:, h - 1 - i : h - 1 - i + x.shape[1]] for i in range(h)], -1)
        product = seen.reshape(-1, w * channels).T @ gradients.reshape(-1, h * features)
        return product.reshape(w, channels, h, features).transpose(2, 0, 1, 3)
    # with a stride rows do not line up, so every row of the kernel takes a product
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    last_row, last_column = (rows - 1) * stride + 1, (columns - 1) * stride + 1
    seen = jnp.concatenate([padded[:, :, j : j + last_column : stride] for j in range(w)], -1)
    pixels = [seen[:, i : i + last_row : stride].reshape(-1, w * channels) for i in range(h)]
    return jnp.stack([p.T @ g.reshape(-1, features) for p in pixels]).reshape(shape)


_canonical_convolution.defvjp(_forward, _backward)


# --- several groups: a sum of products with the shifted image -----------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _shifted_convolution(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    return _shifted_products(x, kernel, stride, groups, pads)


@partial(jax.jit, static_argnums=(2, 3, 4))
def grouped_convolution(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    """Convolve in groups. It is a jitted function so that `cost` recognizes it in a jaxpr."""
    return _shifted_convolution(x, kernel, stride, groups, pads)


def _shifted_products(x: Array, kernel: Array, stride: int, groups: int, pads: Pads) -> Array:
    h, w, _, features = kernel.shape
    batch, channels = x.shape[0], x.shape[-1]
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = ((n - k) // stride + 1 for n, k in zip(padded.shape[1:3], (h, w), strict=True))
    total = jnp.zeros((batch, rows, columns, features), x.dtype)
    for i in range(h):
        for j in range(w):
            end = (batch, i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, channels)
            shifted = lax.slice(padded, (0, i, j, 0), end, (1, stride, stride, 1))
            if groups == channels == features:  # depthwise
                total += shifted * kernel[i, j, 0]
                continue
            parts = shifted.reshape(batch, rows, columns, groups, channels // groups)
            own = kernel[i, j].reshape(channels // groups, groups, features // groups)
            total += jnp.einsum("bhwgi,igo->bhwgo", parts, own).reshape(total.shape)
    return total


def _forward_shifted(
    x: Array, kernel: Array, stride: int, groups: int, pads: tuple[Any, ...]
) -> tuple[Array, tuple[Array, Array]]:
    return _shifted_convolution(x, kernel, stride, groups, pads), (x, kernel)


def _backward_shifted(
    stride: int, groups: int, pads: Pads, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    # Recomputed from x, so that its shifted copies need not be kept.
    _, gradient = jax.vjp(lambda x, k: _shifted_products(x, k, stride, groups, pads), *saved)
    dx, dkernel = gradient(g)
    return dx, dkernel


_shifted_convolution.defvjp(_forward_shifted, _backward_shifted)
