"""2-D convolution as PyTorch pads it, in the form that each backend is fast at.

On CPU XLA brings convolutions to its fast layout outside of loops only, where steps would take 15 to
30 times longer, and its gradient of grouped convolutions is slower still; gradients are therefore
written out, and grouped convolutions, too (docs/decisions.md has the measurements).
"""

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


# --- one group: the gradient as two convolutions in canonical layouts ---------------------------


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _canonical_convolution(x: Array, kernel: Array, stride: int, pads: tuple) -> Array:
    return _convolution(x, kernel, stride, 1, pads)


def _forward(x: Array, kernel: Array, stride: int, pads: tuple) -> tuple[Array, tuple[Array, Array]]:
    return _canonical_convolution(x, kernel, stride, pads), (x, kernel)


def _backward(stride: int, pads: tuple, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    sizes = [
        (low, k, n, (m - 1) * stride + 1)
        for (low, _), k, n, m in zip(pads, kernel.shape, x.shape[1:3], g.shape[1:3], strict=False)
    ]
    # d/dx: the gradient, spread by the stride, with the kernel turned round.
    dx = lax.conv_general_dilated(
        g,
        jnp.flip(kernel, (0, 1)).swapaxes(2, 3),
        (1, 1),
        [(k - 1 - low, n + low - m) for low, k, n, m in sizes],
        lhs_dilation=(stride, stride),
        dimension_numbers=_LAYOUT,
    )
    # d/dkernel: x as C,H,W,B against the gradient as H,W,B,K.
    dkernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        g.transpose(1, 2, 0, 3),
        (1, 1),
        [(low, k - 1 + m - n - low) for low, k, n, m in sizes],
        rhs_dilation=(stride, stride),
        dimension_numbers=_LAYOUT,
    )
    return dx, dkernel.transpose(1, 2, 0, 3)


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
