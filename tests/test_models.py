"""Layers and networks: convolution's gradient, widths, structure, initial values."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import forward
from jax import lax

from ekd_jax import models
from ekd_jax.common.errors import UserError
from ekd_jax.models.convolution import convolution
from ekd_jax.models.layers import BatchNorm, Mode, moments, relu
from ekd_jax.models.members import parse_students

CONVOLUTION = sys.modules[convolution.__module__]


def widths_of(ensemble, shape=(16, 16, 3)):
    """Channels of every student's compressed maps."""
    outputs = ensemble.trace(shape).outputs
    return [tuple(row[i].shape[-1] for row in outputs.features) for i in range(len(ensemble.students))]


def variables_of(ensemble, shape=(16, 16, 3), seed=0):
    return ensemble.trace(shape).init(seed)


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("devices", [1, 8])
def test_convolution_and_its_gradient_are_those_of_xla(size, stride, kernel, devices, monkeypatch):
    """The weight gradient takes all images at once or, on one device, a few at a time."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(CONVOLUTION, "CACHE_BYTES", 1)
    generator = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(generator.normal(size=(2, size, size + 1, 3)))
        w = jnp.asarray(generator.normal(size=(kernel, kernel, 3, 4)))

        def plain(x, w):
            pad = [(kernel // 2, kernel // 2)] * 2
            return lax.conv_general_dilated(
                x, w, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        out, ours = jax.vjp(lambda x, w: convolution(x, w, stride), x, w)
        expected, theirs = jax.vjp(plain, x, w)
        g = jnp.asarray(generator.normal(size=out.shape))
        np.testing.assert_allclose(out, expected, rtol=1e-12)
        for a, b in zip(ours(g), theirs(g), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "features", "kernel", "width", "padding", "computed"),
    [
        (3, 3, 3, 32, "even", (3, 6, 3, 12)),  # four pixels at a time
        (6, 12, 3, 12, "even", (3, 4, 6, 24)),  # two
        (9, 4, 5, 6, "same", (5, 6, 9, 8)),  # a row of six cannot be cut into fours
        (3, 2, 7, 8, "even", (7, 10, 3, 8)),
        (5, 6, 3, 7, "even", (3, 3, 5, 6)),  # an odd row
        (4, 4, 1, 8, "even", (1, 1, 4, 4)),
        (25, 51, 3, 4, "even", (3, 3, 28, 64)),  # padded channels
        (19, 25, 1, 4, "even", (1, 1, 20, 32)),
    ],
)
def test_convolutions_are_computed_in_sizes_that_are_fast(
    channels, features, kernel, width, padding, computed
):
    generator = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(generator.normal(size=(2, 5, width, channels)))
        w = jnp.asarray(generator.normal(size=(kernel, kernel, channels, features)))
        pad = [(kernel // 2, kernel // 2)] * 2
        plain = lambda x, w: lax.conv_general_dilated(
            x, w, (1, 1), pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        ours = lambda x, w: convolution(x, w, padding=padding)
        assert f"f64[{','.join(map(str, computed))}]" in str(jax.make_jaxpr(ours)(x, w))
        (out, gradients), (expected, theirs) = jax.vjp(ours, x, w), jax.vjp(plain, x, w)
        g = jnp.asarray(generator.normal(size=out.shape))
        for a, b in zip((out, *gradients(g)), (expected, *theirs(g)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_relu_is_computed_once_for_two_shapes():
    """XLA's CPU compiler does not look into a call that must not be inlined. If that changes, this fails."""

    def maxima(relu):
        def f(x, k):
            y = relu(2 * x + 1)
            return y.reshape(-1, 4) @ k, y * 2

        compiled = jax.jit(f).lower(jnp.ones((8, 16, 16, 4)), jnp.ones((4, 4))).compile()
        return compiled.as_text().count(" maximum(")

    assert (maxima(relu), maxima(lambda x: jnp.maximum(x, 0))) == (1, 2)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_gradient_of_batch_norm_includes_its_statistics(groups):
    """It is autodiff's gradient of the formula, whoever computed the moments."""
    mode, generator = Mode(train=True, groups=groups), np.random.default_rng(0)
    with jax.enable_x64(True):
        x, g = jnp.asarray(generator.normal(2.0, 3.0, (2, 4, 3, 3, 2)))
        variables = {
            "params": {"scale": jnp.array([1.5, -2.0]), "bias": jnp.array([0.3, 0.0])},
            "batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(2)},
        }

        def ours(x, params, known):
            own = {**variables, "params": params}
            return BatchNorm().apply(own, x, mode, known, mutable=["batch_stats"])[0]

        def plain(x, params):
            y = x.reshape(groups, -1, 2)
            y = (y - y.mean(1, keepdims=True)) / jnp.sqrt(y.var(1, keepdims=True) + mode.epsilon)
            return (y * params["scale"] + params["bias"]).reshape(x.shape)

        expected = jax.vjp(plain, x, variables["params"])[1](g)
        for known in (None, moments(x, mode)):
            found = jax.vjp(lambda x, p, known=known: ours(x, p, known), x, variables["params"])[1](g)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, expected
            )


def test_batch_norm_follows_pytorch():
    """The running variance is unbiased, and momentum is .1 in PyTorch's sense."""
    x = np.random.default_rng(0).normal(3.0, 2.0, (4, 5, 5, 2)).astype(np.float32)
    start = {
        "params": {"scale": jnp.array([1.0, 2.0]), "bias": jnp.array([0.0, -1.0])},
        "batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(2)},
    }
    out, updated = BatchNorm().apply(start, x, Mode(train=True), mutable=["batch_stats"])
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = (x - mean) / np.sqrt(var + 1e-5) * [1, 2] + [0, -1]
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6)
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-5)
    out = BatchNorm().apply(start, x, Mode())
    np.testing.assert_allclose(out, x / np.sqrt(1 + 1e-5) * [1, 2] + [0, -1], atol=1e-5)


@pytest.mark.parametrize(
    ("students", "expected"),
    [
        (5, [(16, 32, 64), (12, 25, 51), (9, 19, 38), (6, 12, 25), (3, 6, 12)]),
        (4, [(16, 32, 64), (12, 24, 48), (8, 16, 32), (4, 8, 16)]),
        (3, [(16, 32, 64), (10, 21, 42), (5, 10, 21)]),
        (1, [(16, 32, 64)]),
        ((1, 0.7, 0.2), [(16, 32, 64), (11, 22, 44), (3, 6, 12)]),
        ((0.2,), [(3, 6, 12)]),
    ],
)
def test_widths_are_floored(students, expected):
    ensemble = models.build_ensemble("resnet8", students, 10)
    assert widths_of(ensemble) == expected


@pytest.mark.parametrize(
    ("compressed_stages", "widths", "maps"),
    [(3, (8, 16, 32), 3), (2, (16, 16, 32), 2), (1, (16, 32, 32), 1)],
)
def test_compressed_blocks_are_the_matched_ones(compressed_stages, widths, maps):
    ensemble = models.build_ensemble("resnet8", (1, 0.5), 10, compressed_stages=compressed_stages)
    assert widths_of(ensemble)[1] == widths[-maps:]
    outputs = ensemble.trace((16, 16, 3)).outputs
    sizes = [(16, 16, 16), (8, 8, 32), (4, 4, 64)][-maps:]
    assert [row[0].shape[1:] for row in outputs.features] == sizes
    assert all(row[1].shape[-1] * 2 == row[0].shape[-1] for row in outputs.features)


def test_names_of_variables():
    ensemble = models.build_ensemble("resnet14", 2, 10)
    variables = variables_of(ensemble)
    assert set(variables["params"]) == set(variables["batch_stats"]) == {"base", "students"}
    assert set(variables["params"]["students"]) == {"1", "2"}
    first = variables["params"]["students"]["1"]["stage1"]["first"]
    assert "shortcut_conv" not in first, "student 1 keeps the identity shortcut in stage 1"
    assert "shortcut_conv" in variables["params"]["students"]["2"]["stage1"]["first"]


def test_initial_values_follow_the_official_rules():
    """Convolutions and classifier are Xavier normal, the bias is U(+-1/sqrt(fan_in)), batch norm 1 and 0."""
    ensemble = models.build_ensemble("resnet110", 1, 100)
    branch = variables_of(ensemble)["params"]["students"]["1"]
    conv = branch["stage3"]["rest"]["conv2"]["kernel"]  # (17, 3, 3, 64, 64)
    std = math.sqrt(2 / (9 * (64 + 64)))
    assert conv.std() == pytest.approx(std, rel=0.01)
    assert abs(conv.mean()) < 0.01 * std
    np.testing.assert_allclose(conv.std((1, 2, 3, 4)), std, rtol=0.03)  # the same in each stacked block
    assert not np.array_equal(conv[0], conv[1])
    assert branch["head"]["linear"]["kernel"].std() == pytest.approx(math.sqrt(2 / 164), rel=0.05)
    bias = branch["head"]["linear"]["bias"]
    assert 0.8 / 8 < np.abs(bias).max() <= 1 / 8
    assert (branch["stage1"]["rest"]["bn1"]["scale"] == 1).all()
    assert (branch["stage1"]["rest"]["bn1"]["bias"] == 0).all()


def test_initial_values_depend_on_seed_and_place_alone():
    leaves = jax.tree.leaves
    two, three = (models.build_ensemble("resnet8", n, 10) for n in ((1, 0.5), (1, 0.5, 0.5)))
    a, b, c = variables_of(two), variables_of(three), variables_of(two, seed=1)
    own = lambda v, i: two.student_subtrees(v["params"], i)
    for i in (1, 2):  # a third student changes nothing for the first two
        assert all(np.array_equal(x, y) for x, y in zip(leaves(own(a, i)), leaves(own(b, i)), strict=True))
    kernel = lambda v, i: v["params"]["students"][str(i)]["stage1"]["first"]["conv1"]["kernel"]
    assert not np.array_equal(kernel(a, 2), kernel(c, 2)), "another seed"
    assert not np.array_equal(kernel(b, 2), kernel(b, 3)), "another student of the same width"


def test_an_extracted_student_gives_the_same_logits_as_in_the_ensemble():
    ensemble = models.build_ensemble("resnet14", 3, 10)
    variables = variables_of(ensemble)
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    outputs, _ = forward(ensemble, variables, images, train=False)
    for i in (1, 2, 3):
        alone = jax.jit(ensemble.student(i).logits)(ensemble.student_variables(variables, i), images)
        np.testing.assert_allclose(alone, outputs.logits_SxBxK[i - 1], atol=1e-6)


def test_bfloat16_keeps_logits_and_statistics_in_float32():
    wide, narrow = (models.build_ensemble("resnet8", 2, 10, dtype=d) for d in ("float32", "bfloat16"))
    variables = variables_of(wide)
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    full, _ = forward(wide, variables, images, train=True)
    half, stats = forward(narrow, variables, images, train=True)
    assert half.features[0][0].dtype == jnp.bfloat16
    assert half.logits_SxBxK.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(half.logits_SxBxK, full.logits_SxBxK, atol=0.1)


@pytest.mark.parametrize("students", [0, -1, (), (1, 0), (1, -0.5), True, "five", (1, "?"), 2.5])
def test_impossible_students(students):
    with pytest.raises(UserError, match="students"):
        parse_students(students)


def test_a_width_without_channels_names_the_smallest_that_works():
    with pytest.raises(UserError, match=r"width 0\.05 .* smallest usable width is 0\.0625"):
        models.build_ensemble("resnet8", (1, 0.05), 10)
    assert widths_of(models.build_ensemble("resnet8", (0.0625,), 10)) == [(1, 2, 4)]


@pytest.mark.parametrize("compressed_stages", [-1, 4])
def test_impossible_number_of_blocks(compressed_stages):
    with pytest.raises(UserError, match="between 1 and 3"):
        models.build_ensemble("resnet8", 2, 10, compressed_stages=compressed_stages)
