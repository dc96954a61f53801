"""TensorFlow's padding "same" for maps of every size, and in every form in which convolutions are computed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ekd_jax.models.convolution import convolution


def plain(x, kernel, stride, groups):
    """XLA's own convolution, with TensorFlow's padding."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize(
    ("size", "stride", "kernel"), [(8, 2, 3), (9, 1, 3), (9, 2, 1), (9, 2, 3), (13, 2, 5), (13, 3, 5)]
)
@pytest.mark.parametrize(
    ("backend", "groups"),
    [("cpu", 1), ("cpu", 2), ("cpu", 4), ("gpu", 4)],
    ids=["dense", "grouped", "depthwise", "xla"],
)
def test_same_and_its_gradient_are_xlas(size, stride, kernel, backend, groups, monkeypatch):
    """The height is `size`, the width 6, so that the two axes are padded differently."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # the form for it, computed here
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1, size, 6, 4)).astype(np.float32)
    w = generator.normal(size=(kernel, kernel, 4 // groups, 4)).astype(np.float32)

    @jax.jit
    def both(x, w):
        ours = jax.vjp(lambda x, w: convolution(x, w, stride, groups, "same"), x, w)
        theirs = jax.vjp(lambda x, w: plain(x, w, stride, groups), x, w)
        return [(out, *gradient(jnp.ones_like(out))) for out, gradient in (ours, theirs)]

    found, expected = both(x, w)
    assert found[0].shape == (1, -(-size // stride), -(-6 // stride), 4)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_efficientnets_at_their_own_resolutions():
    """Every strided convolution of B0 to B7 pads the maps that it gets as TensorFlow does, odd sizes included."""
    strided = [
        (3, 1),
        (3, 2),
        (5, 4),
        (3, 8),
        (5, 16),
    ]  # kernel, and size of the image over that of the map
    for resolution, (kernel, scale) in itertools.product((224, 240, 260, 300, 380, 456, 528, 600), strided):
        size = -(-resolution // scale)
        x, w = jnp.zeros((1, size, size, 1)), jnp.zeros((kernel, kernel, 1, 1))
        program = str(jax.make_jaxpr(lambda x, w: convolution(x, w, 2, padding="same"))(x, w))
        pads = tuple(lax.padtype_to_pads((size, size), (kernel, kernel), (2, 2), "SAME"))
        assert f"padding={pads}" in program, (resolution, size)


def test_even_sizes_are_padded_by_k_minus_stride():
    """The official code of the ensemble method pads so whatever the size; its images have even sizes."""
    for size, kernel in itertools.product((2, 8), (1, 3, 5)):
        x = jnp.zeros((1, size, size, 1)).at[:, 0, 0].set(1.0).at[:, -1, -1].set(2.0)
        w = jnp.arange(1.0, kernel**2 + 1).reshape(kernel, kernel, 1, 1)
        before = max(kernel - 2, 0) // 2
        pads = [(before, max(kernel - 2, 0) - before)] * 2
        expected = lax.conv_general_dilated(x, w, (2, 2), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        np.testing.assert_array_equal(convolution(x, w, 2, padding="same"), expected)
