"""Every family has the published sizes, its options work, and dropout is reproducible."""

import dataclasses
import doctest
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from conftest import REFERENCE, ROOT, tiny_config

from ekd_jax import models
from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.config.build import build_networks
from ekd_jax.models import registry
from ekd_jax.models.cost import count_parameters
from ekd_jax.models.layers import BatchNorm, Dropout, Mode

OFFICIAL = json.loads((REFERENCE / "param_counts.json").read_text())["models"]
OUR_NAMES = {"DenseNetBC_12_100": "densenet_bc_12_100", "DenseNet121": "densenet121"}
CIFAR = ("cifar", "_bc_", "wrn_", "vgg", "x4", "_a", "resnet110", "resnet8", "resnet14")
SMALL = [n for n in models.MODELS if "resnet" not in n or n in ("resnet8", "resnet18", "resnet8x4")]
DEEPER = (
    "densenet_bc_24_250",
    "densenet_bc_40_190",
    "densenet121",
    *(f"efficientnet_b{k}" for k in range(1, 8)),
)
BY_DEPTH = [
    pytest.param(n, marks=pytest.mark.slow) if n in DEEPER else n for n in SMALL
]  # of a family one is enough


def size_of(name):
    return 32 if any(part in name for part in CIFAR) and name != "resnet18" else 64


def alone(name, classes, **options):
    return models.build_ensemble(name, 1, classes, **options)


# A network whose students are counted with 10 classes has another head with 100, as that of ResNet20 shows.
ANOTHER_HEAD = [
    k for k in OFFICIAL if k.endswith("classes=100") and k[:-1] in OFFICIAL and "ResNet20" not in k
]


@pytest.mark.parametrize(
    "key", [pytest.param(k, marks=pytest.mark.slow) if k in ANOTHER_HEAD else k for k in OFFICIAL]
)
def test_parameters_of_every_student_are_the_official_codes(key):
    name, students, compressed_stages, classes = key.split("|")[:4]
    number = lambda text: int(text.split("=")[1])
    ensemble = models.build_ensemble(
        OUR_NAMES.get(name, name.lower()),
        number(students),
        number(classes),
        compressed_stages=number(compressed_stages),
    )
    params = ensemble.trace((64, 64, 3)).init(None)["params"]
    assert count_parameters(params["base"]) == OFFICIAL[key]["base"]
    branches = [count_parameters(tree) for tree in params["students"].values()]
    assert branches == OFFICIAL[key].get("branches", branches)
    totals = [count_parameters(ensemble.student_subtrees(params, i + 1)) for i in range(number(students))]
    assert totals == OFFICIAL[key]["student_total"]


@pytest.mark.parametrize("name", published.PARAMETERS)
def test_parameters_at_width_1_are_the_published_ones(name):
    ten = name == "wrn_28_10" or name.endswith("_a") or "_bc_" in name
    classes = 1000 if name in published.GMACS else 10 if ten else 100
    ensemble = alone(name, classes)
    params = ensemble.trace((64, 64, 3)).init(None)["params"]
    assert count_parameters(params) == published.PARAMETERS[name]


@pytest.mark.parametrize("name", published.GMACS)
def test_multiply_accumulates_are_the_published_ones(name):
    size, billions = published.GMACS[name]
    # torchvision computes EfficientNets with even padding.
    ensemble = alone(name, 1000, **({"padding": "even"} if "efficientnet" in name else {}))
    cost = ensemble.trace((size, size, 3)).cost(1)
    rounding = 0.0005 / billions
    assert cost.macs / 1e9 == pytest.approx(billions, rel=0.01 + rounding)


def test_activations_are_those_of_the_convolutions():
    """ResNet-50 has 11.1 million activations at 224 pixels ("MActs" in timm's benchmark tables)."""
    ensemble = alone("resnet50", 1000)
    cost = ensemble.trace((224, 224, 3)).cost(1)
    assert cost.activations / 1e6 == pytest.approx(11.1, abs=0.05)


@pytest.mark.parametrize("name", BY_DEPTH)
def test_maps_of_students_of_any_width_have_the_same_size(name):
    """Maps of three students, one very narrow, have equal height and width and fewer channels."""
    size = size_of(name)
    ensemble = models.build_ensemble(name, (1, 0.55, 0.25), 7)
    trace = ensemble.trace((size, size, 3))
    variables, outputs = trace.init(None), trace.outputs
    assert outputs.logits_SxBxK.shape == (3, 1, 7)
    assert outputs.logits_SxBxK.dtype == jnp.float32
    assert len(outputs.features) == len(ensemble.matched[0])
    for row in outputs.features:
        assert len({x.shape[:3] for x in row}) == 1
    channels = [sum(row[i].shape[-1] for row in outputs.features) for i in range(3)]
    assert channels[0] > channels[1] > channels[2]
    sizes = [count_parameters(ensemble.student_subtrees(variables["params"], i)) for i in (1, 2, 3)]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("name", ["densenet_bc_12_100", "efficientnet_b0", "resnet18", "wrn_16_2", "vgg8"])
def test_only_the_last_stages_can_be_compressed(name):
    ensemble = models.build_ensemble(name, (1, 0.5), 7, compressed_stages=1)
    trace = ensemble.trace((64, 64, 3))
    assert len(trace.outputs.features) == 1
    whole = models.build_ensemble(name, (1, 0.5), 7)
    variables = whole.trace((64, 64, 3)).init(None)["params"]["students"]["2"]
    full, last_alone = (trace.init(None)["params"]["students"][i] for i in "12")
    first = min(name for name in variables if name.startswith("stage"))
    assert count_parameters(last_alone) > count_parameters(variables)
    assert count_parameters(last_alone[first]) == count_parameters(full[first]), (
        "the first stage keeps its width"
    )


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_the_cut_can_be_moved(shared):
    """ONE shares two stages. The parameters of a whole student stay the same."""
    ensemble = models.build_ensemble("resnet32", (1, 1, 1), 100, shared_stages=shared)
    params = ensemble.trace((32, 32, 3)).init(None)["params"]
    stages = [name for name in params["base"] if name.startswith("stage")]
    assert stages == [f"stage{i}" for i in range(1, shared + 1)]
    assert count_parameters(ensemble.student_subtrees(params, 3)) == 472_756
    if shared == 2:  # ONE's ResNet-32 has 1,193,189 with its gate (docs/reference/one.md)
        assert count_parameters(params) + 32 * 3 + 3 + 2 * 3 == 1_193_189


def test_impossible_cuts():
    with pytest.raises(UserError, match="model.shared_stages=3: at least 1 of the 3 stages"):
        alone("resnet20", 10, shared_stages=3)
    with pytest.raises(UserError, match="compressed_stages=2 must be between 1 and 1"):
        alone("resnet20", 10, shared_stages=2, compressed_stages=2)
    with pytest.raises(UserError, match="smallest usable width is 0.15"):
        models.build_ensemble("shufflenet_v1_cifar", (0.1,), 10)


@pytest.mark.parametrize(("last_map", "channels"), [("", 1280), ("pooled", 1280), ("stage", 320)])
def test_which_map_of_an_efficientnet_is_matched(last_map, channels):
    """The official code matches the 1280-channel map, the paper's figure shows 320 channels."""
    ensemble = models.build_ensemble("efficientnet_b0", (1, 0.2), 10, last_map=last_map)
    outputs = ensemble.trace((64, 64, 3)).outputs
    assert [row[0].shape[-1] for row in outputs.features] == [40, 112, channels]
    smallest = [row[1].shape[-1] for row in outputs.features]
    assert smallest == [8, 24, 256 if channels == 1280 else 64]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("efficientnet_b2", [(48, 120, 1408), (32, 96, 1128), (24, 72, 848), (16, 48, 560), (8, 24, 280)]),
        pytest.param(
            "efficientnet_b4",
            [(56, 160, 1792), (48, 128, 1432), (32, 96, 1072), (24, 64, 720), (16, 32, 360)],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_channels_of_efficientnet_students(name, expected):
    """Those of docs/reference/networks.md#efficientnet; the last map of each stage."""
    outputs = models.build_ensemble(name, 5, 10).trace((64, 64, 3)).outputs
    assert [tuple(row[i].shape[-1] for row in outputs.features) for i in range(5)] == expected


@pytest.mark.parametrize("name", ["efficientnet_b7", "resnext101_32x8d", "densenet_bc_40_190"])
def test_initial_values_follow_their_rules(name):
    """Every convolution kernel at width .2 has the standard deviation sqrt(2 / fan_out)."""
    ensemble = models.build_ensemble(name, (0.2,), 10)
    params = ensemble.trace((64, 64, 3)).init(0)["params"]
    branch = params["students"]["1"]
    leaves = jax.tree_util.tree_leaves_with_path({k: v for k, v in branch.items() if k != "head"})
    kernels = [leaf for path, leaf in leaves if path[-1].key == "kernel" and leaf.size > 5000]
    assert kernels
    for kernel in kernels:
        fan_out = math.prod(kernel.shape[-4:-2]) * kernel.shape[-1]
        assert kernel.std() == pytest.approx(math.sqrt(2 / fan_out), rel=0.06)


def test_dropout_depends_only_on_key_and_student():
    ensemble = models.build_ensemble("mobilenet_v2_cifar", (0.2, 0.2), 5, stochastic_depth=0.5, dropout=0.5)
    variables = ensemble.trace((32, 32, 3)).init(0)
    images = jax.random.normal(jax.random.key(1), (8, 32, 32, 3))
    apply = lambda images, key: ensemble.apply(variables, images, train=True, key=key)[0].logits_SxBxK
    run = jax.jit(apply)
    first, again, other = (run(images, jax.random.key(key)) for key in (2, 2, 3))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-3)
    assert not np.allclose(first[0], first[1], atol=1e-3)


def test_dropout_does_not_depend_on_the_devices():
    x = np.ones((16, 3, 3, 2), np.float32)
    run = jax.jit(
        lambda x: Dropout(0.5).apply({}, x, Mode(train=True), rngs={"dropout": jax.random.key(0)})
    )
    over_eight = jax.device_put(x, parallel.split(parallel.make_mesh()))
    np.testing.assert_array_equal(run(over_eight), run(x))


def test_dropout_scales_what_it_keeps():
    x = jnp.ones((1000, 4, 4, 2))
    mode = Mode(train=True)
    for whole in (False, True):
        y = Dropout(0.25, whole).apply({}, x, mode, rngs={"dropout": jax.random.key(0)})
        assert set(np.unique(y).round(5)) == {0, np.float32(4 / 3).round(5)}
        assert y.mean() == pytest.approx(1, abs=0.05)
        each = np.asarray(y).reshape(1000, -1)
        assert (each.min(1) == each.max(1)).all() == whole, "whole examples, or single values"
    assert (Dropout(0.25).apply({}, x, dataclasses.replace(mode, train=False)) == x).all()


def test_local_batch_norm_is_that_of_every_part():
    """Each device normalizes its part as PyTorch does, and running statistics move to the parts' mean."""
    x = np.random.default_rng(0).normal(2.0, 3.0, (8, 3, 3, 2)).astype(np.float32)
    start = {
        "params": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
        "batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(2)},
    }
    mode = lambda groups: Mode(train=True, groups=groups)
    run = lambda x, groups: BatchNorm().apply(start, x, mode(groups), mutable=["batch_stats"])
    together, stats = run(x, 4)
    parts = [run(x[i : i + 2], 1) for i in (0, 2, 4, 6)]
    np.testing.assert_allclose(together, np.concatenate([y for y, _ in parts]), atol=1e-6)
    for name in ("mean", "var"):
        each = np.stack([s["batch_stats"][name] for _, s in parts])
        np.testing.assert_allclose(stats["batch_stats"][name], each.mean(0), rtol=1e-5)
    assert not np.allclose(together, run(x, 1)[0], atol=1e-2)


def test_the_session_in_the_docs():
    """The Python session in docs/models.md prints what stands there."""
    session = (ROOT / "docs/models.md").read_text().split("```pycon\n")[1].split("```")[0]
    example = doctest.DocTestParser().get_doctest(session, {}, "docs/models.md", None, 0)
    assert not doctest.DocTestRunner().run(example).failed


def test_the_worked_example_of_the_docs(monkeypatch):
    """It has under 60 lines, and MobileNet V1's 4,231,976 parameters (4.2 million in the paper)."""
    text = (ROOT / "docs/models.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert code.count("\n") < 60
    module = {"__name__": "mobilenet_v1"}
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))  # forgotten afterwards
    exec(code, module)
    ensemble = models.build_ensemble("mobilenet_v1", (1, 0.5), 1000)
    trace = ensemble.trace((224, 224, 3))
    params = trace.init(None)["params"]
    assert count_parameters(ensemble.student_subtrees(params, 1)) == 4_231_976
    maps = trace.outputs.features
    assert [row[1].shape for row in maps] == [(1, 28, 28, 128), (1, 14, 14, 256), (1, 7, 7, 512)]


@pytest.mark.parametrize("batch_norm", ["global", "local"])
def test_only_global_batch_norm_waits_for_other_devices(batch_norm):
    """The compiled forward pass of a batch on eight devices has all-reduces only then."""
    config = tiny_config(model__batch_norm=batch_norm)
    mesh = parallel.make_mesh()
    networks = build_networks(config, 10, (8, 8, 1), mesh.size)
    ensemble, variables = networks.ensemble, parallel.replicate(mesh, networks.trace.init(0))
    images = jax.device_put(np.zeros((16, 8, 8, 1), np.float32), parallel.split(mesh))
    forward = lambda variables, images: ensemble.apply(variables, images, train=True)[0].logits_SxBxK
    program = jax.jit(forward).lower(variables, images).compile().as_text()
    assert ("all-reduce" in program) == (batch_norm == "global")
