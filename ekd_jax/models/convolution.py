"""2-D convolution as PyTorch pads it, in the form that each backend is fast at.

On CPU XLA brings convolutions to its fast layout outside of loops only, where steps would take 15 to
30 times longer, and its gradient of grouped convolutions is slower still; gradients are therefore
written out, and grouped convolutions, too (docs/decisions.md has the measurements).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolution(x: Array, kernel: Array, stride: int = 1, groups: int = 1, padding: str = "even") -> Array:
    """2-D convolution with zeros around the image.

    Args:
        x: (B, H, W, C).
        kernel: (h, w, C // groups, K), h and w odd.
        stride: of both axes.
        groups: channels are cut into so many parts that do not see each other.
        padding: "even": (k - 1) // 2 on every side, as PyTorch networks pad; "same": k - stride in
            all, the odd one right and below, as TensorFlow's do where the stride divides the size.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), K) in x's dtype.
    """
    pads = tuple(_pads(k, stride, padding) for k in kernel.shape[:2])
    if jax.default_backend() != "cpu":
        return _convolution(x, kernel, stride, groups, pads)
    if groups == 1:
        return _canonical_convolution(x, kernel, stride, pads)
    return grouped_convolution(x, kernel, stride, groups, pads)


def _pads(size: int, stride: int, padding: str) -> tuple[int, int]:
    if padding == "even":
        return (size - 1) // 2, (size - 1) // 2
    total = max(size - stride, 0)
    return total // 2, total - total // 2


def _convolution(x: Array, kernel: Array, stride: int, groups: int, pads: tuple) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=_LAYOUT, feature_group_count=groups
    )


# --- one group: sizes that are fast, the gradient as a convolution and as matrix products --------

UNEVEN = {*range(25, 32), *range(49, 64)}  # features that take longer than the next multiple of 32 of them
CACHE = 2**21  # bytes that the weight gradient works on at a time: about a core's second-level cache


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _canonical_convolution(x: Array, kernel: Array, stride: int, pads: tuple) -> Array:
    _, width, channels, features = kernel.shape
    together = 1
    if stride == 1 and width > 1 and sum(pads[1]) == width - 1:  # images keep their width
        together = 4 if features <= 4 else 2 if features <= 12 and channels % 2 == 0 else 1
    return fitted_convolution(x, kernel, stride, pads, math.gcd(together, x.shape[2]))


@partial(jax.jit, static_argnums=(2, 3, 4))
def fitted_convolution(x: Array, kernel: Array, stride: int, pads: tuple, together: int) -> Array:
    """The same in sizes that XLA's CPU kernels are fast at (docs/performance.md has the measurements).

    Few features leave most of a vector register empty. So those of `together` neighboring pixels are
    computed as the features of one, by a kernel that is as many pixels wider, mostly zeros, and moves on by
    as many. More than 12 channels are filled up to a multiple of 4, and features where they are `UNEVEN`.

    A function of its own so that `describe` can tell it in a jaxpr.
    """
    channels, features = kernel.shape[2:]
    if together > 1:
        spread = [(p, together - 1 - p) for p in range(together)]
        kernel = jnp.concatenate([jnp.pad(kernel, ((0, 0), s, (0, 0), (0, 0))) for s in spread], -1)
    outputs = together * features
    more_in = -channels % 4 if channels > 12 else 0
    more_out = -outputs % 32 if outputs in UNEVEN else 0
    x = jnp.pad(x, (*[(0, 0)] * 3, (0, more_in)))
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, more_in), (0, more_out)))
    strides = (stride, stride * together)
    y = lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_LAYOUT)[..., :outputs]
    return y.reshape(*y.shape[:2], -1, features)


def _forward(x: Array, kernel: Array, stride: int, pads: tuple) -> tuple[Array, tuple[Array, Array]]:
    return _canonical_convolution(x, kernel, stride, pads), (x, kernel)


def _backward(stride: int, pads: tuple, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    sizes = [
        (low, k, n, (m - 1) * stride + 1)
        for (low, _), k, n, m in zip(pads, kernel.shape, x.shape[1:3], g.shape[1:3], strict=False)
    ]
    # d/dx: the gradient, spread by the stride, with the kernel turned round.
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    around = tuple((k - 1 - low, n + low - m) for low, k, n, m in sizes)
    if stride == 1:
        dx = _canonical_convolution(g, turned, 1, around)
    else:
        dx = lax.conv_general_dilated(
            g, turned, (1, 1), around, lhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
        )
    return dx, _kernel_gradient(x, kernel.shape, stride, pads, g)


def _kernel_gradient(x: Array, shape: tuple[int, ...], stride: int, pads: tuple, g: Array) -> Array:
    """d/dkernel, (h, w, C, K), a few images at a time: what is put side by side stays in the cache.

    Where devices share a batch it is taken whole, or they would exchange every few images' gradient.
    """
    batch, height, width, channels = x.shape
    image = x.dtype.itemsize * height * width * (shape[1] * channels + shape[0] * shape[3])
    some = math.gcd(batch, 2 ** int(math.log2(max(1, CACHE // image))))
    if some == batch or shape[0] == shape[1] == 1 or jax.device_count() > 1:
        return _kernel_gradient_at_once(x, shape, stride, pads, g)

    def body(total: Array, few: tuple[Array, ...]) -> tuple[Array, None]:
        return total + _kernel_gradient_at_once(few[0], shape, stride, pads, few[1]), None

    parts = tuple(v.reshape(-1, some, *v.shape[1:]) for v in (x, g))
    total, _ = lax.scan(body, jnp.zeros(shape, x.dtype), parts)
    return total


def _kernel_gradient_at_once(x: Array, shape: tuple[int, ...], stride: int, pads: tuple, g: Array) -> Array:
    """As matrix products: for every pixel, the w columns of x that a row of the kernel sees side by side,
    times the gradients of the h rows of pixels that see it."""
    (h, w, channels, features), (_, rows, columns, _) = shape, g.shape
    (top, bottom), sides = pads
    if stride == 1:
        padded = jnp.pad(x, ((0, 0), (0, 0), sides, (0, 0)))
        seen = jnp.concatenate([padded[:, :, j : j + columns] for j in range(w)], -1)
        spread = jnp.pad(g, ((0, 0), (h - 1 - top, h - 1 - bottom), (0, 0), (0, 0)))
        given = jnp.concatenate([spread[:, h - 1 - i : h - 1 - i + x.shape[1]] for i in range(h)], -1)
        product = seen.reshape(-1, w * channels).T @ given.reshape(-1, h * features)
        return product.reshape(w, channels, h, features).transpose(2, 0, 1, 3)
    # with a stride rows do not line up: one product for each row of the kernel
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    last_row, last_column = (rows - 1) * stride + 1, (columns - 1) * stride + 1
    seen = jnp.concatenate([padded[:, :, j : j + last_column : stride] for j in range(w)], -1)
    pixels = [seen[:, i : i + last_row : stride].reshape(-1, w * channels) for i in range(h)]
    return jnp.stack([p.T @ g.reshape(-1, features) for p in pixels]).reshape(shape)


_canonical_convolution.defvjp(_forward, _backward)


# --- several groups: a sum of products with the shifted image -----------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _shifted_convolution(x: Array, kernel: Array, stride: int, groups: int, pads: tuple) -> Array:
    return _shifted_products(x, kernel, stride, groups, pads)


@partial(jax.jit, static_argnums=(2, 3, 4))
def grouped_convolution(x: Array, kernel: Array, stride: int, groups: int, pads: tuple) -> Array:
    """As `convolution`; a function of its own so that `describe` can tell it in a jaxpr."""
    return _shifted_convolution(x, kernel, stride, groups, pads)


def _shifted_products(x: Array, kernel: Array, stride: int, groups: int, pads: tuple) -> Array:
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
    x: Array, kernel: Array, stride: int, groups: int, pads: tuple
) -> tuple[Array, tuple[Array, Array]]:
    return _shifted_convolution(x, kernel, stride, groups, pads), (x, kernel)


def _backward_shifted(
    stride: int, groups: int, pads: tuple, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    # From x again, so that its shifted copies need not be kept.
    _, gradient = jax.vjp(lambda x, k: _shifted_products(x, k, stride, groups, pads), *saved)
    dx, dkernel = gradient(g)
    return dx, dkernel


_shifted_convolution.defvjp(_forward_shifted, _backward_shifted)
