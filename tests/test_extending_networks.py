"""Networks of plain Linen modules from outside the package."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import forward, tiny_config

from ekd_jax import models
from ekd_jax.common.errors import UserError
from ekd_jax.config.build import build_networks
from ekd_jax.config.resolve import resolve
from ekd_jax.models import registry
from ekd_jax.models.blocks import Stage, Stem
from ekd_jax.models.family import Architecture, Family, scale_channels
from ekd_jax.models.linen import linen_head, linen_part
from ekd_jax.runs.state import init_state
from ekd_jax.training.step import make_step

SHAPE = (8, 8, 1)


class Block(nn.Module):
    """Convolution, batch norm, ReLU, dropout."""

    features: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(self.features, (3, 3), strides=2, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))


class Nested(nn.Module):
    """A stage with a submodule of its own class."""

    features: int
    inner: bool = True

    @nn.compact
    def __call__(self, x, train: bool):
        x = Nested(self.features, inner=False)(x, train) if self.inner else x
        return Block(self.features)(x, train)


class Pooling(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def plain_network(dropout=0.0, **changes):
    parts = {
        "stem": lambda: nn.Conv(4, (3, 3)),
        "stages": [
            lambda width: Block(int(8 * width), dropout),
            lambda width: Nested(scale_channels(16, width)),
        ],
        "head": Pooling,
    }
    return models.linen_network(**parts | changes)


@pytest.fixture(autouse=True)
def registered():
    """Forget the networks that a test registers."""
    known = dict(registry.MODELS)
    yield
    for name in set(registry.MODELS) - set(known):
        del registry.MODELS[name]


def images_of(size=6):
    return np.random.default_rng(0).normal(size=(size, *SHAPE)).astype(np.float32)


def test_a_part_computes_what_its_module_computes():
    """The variables of a part are those of its module, by the same names."""
    models.register_network("plain", plain_network())
    ensemble = models.build_ensemble("plain", (1, 0.5), 10)
    variables = ensemble.trace(SHAPE).init(0)
    outputs, _ = forward(ensemble, variables, images_of(), train=False)
    own = ensemble.student_variables(variables, 2)
    part = lambda name: {kind: tree[name] for kind, tree in own.items() if name in tree}
    x = nn.Conv(4, (3, 3)).apply(part("stem"), images_of())
    x = Block(4).apply(part("stage1"), x, train=False)
    np.testing.assert_allclose(outputs.features[0][1], x, atol=1e-6)
    x = Nested(8).apply(part("stage2"), x, train=False)
    np.testing.assert_allclose(outputs.features[1][1], x, atol=1e-6)
    logits = Pooling(10).apply(part("head"), x)
    np.testing.assert_allclose(outputs.logits_SxBxK[1], logits, atol=1e-6)
    np.testing.assert_allclose(ensemble.student(2).logits(own, images_of()), logits, atol=1e-6)


def test_initial_values_depend_on_seed_and_place_alone():
    models.register_network("plain", plain_network())
    two, three = (
        models.build_ensemble("plain", students, 10).trace(SHAPE) for students in ((1, 0.5), (1, 0.5, 0.5))
    )
    a, b = two.init(0), three.init(0)
    for i in "12":
        jax.tree.map(np.testing.assert_array_equal, *(v["params"]["students"][i] for v in (a, b)))
    kernel = lambda v, i: v["params"]["students"][i]["stage1"]["Conv_0"]["kernel"]
    assert not np.array_equal(kernel(b, "2"), kernel(b, "3")), "another student of the same width"
    assert not np.array_equal(kernel(b, "2"), kernel(three.init(1), "2")), "another seed"
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), three.init(None))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), b)
    assert three.cost(1).macs > three.cost(2).macs > 0


def test_students_learn_and_keep_statistics():
    """Every method gets what it needs: here the adaptation layers of the paper's."""
    models.register_network("plain", plain_network(dropout=0.2))
    config = tiny_config(model__name="plain")
    networks, sgd = build_networks(config, 10, SHAPE), optax.sgd(0.1)
    state = init_state(networks, sgd, 0)
    step = jax.jit(make_step(networks, sgd))
    labels = np.arange(6) % 10
    after, metrics = step(state, images_of(), labels, jax.random.key(0))
    again, _ = step(state, images_of(), labels, jax.random.key(0))
    other, _ = step(state, images_of(), labels, jax.random.key(1))
    assert np.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), state.batch_stats, after.batch_stats)
    assert all(jax.tree.leaves(moved["students"]))
    assert moved["students"]["1"]["stage1"].keys() == {"BatchNorm_0"}
    jax.tree.map(np.testing.assert_array_equal, after.params, again.params)
    kernel = lambda state: state.params["students"]["2"]["head"]["Dense_0"]["kernel"]
    assert not np.array_equal(kernel(after), kernel(other)), "what is dropped depends on the key"


def test_equal_students_run_stacked_as_they_run_separate():
    models.register_network("plain", plain_network())
    results = []
    for execution in ("separate", "stacked"):
        ensemble = models.build_ensemble("plain", (0.5, 0.5), 10, execution=execution, rematerialize=True)
        assert ensemble.executions == ["separate", "stacked"]
        variables = ensemble.trace(SHAPE).init(0)
        results.append(jax.jit(lambda v, e=ensemble: e.apply(v, images_of(), train=True))(variables))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_linen_modules_and_layers_of_the_package_mix():
    """A Linen block scanned in a stage of ours, and a head that depends on the width."""

    class Twin(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x, train):
            return x + nn.Dropout(0.5, deterministic=not train)(nn.Conv(self.features, (3, 3))(x))

    def build(widths, options):
        scanned = lambda stride=1, name=None: linen_part(Twin(4))(name=name)
        return Architecture(
            stem=lambda name=None: Stem(4, name=name),
            stages=[lambda name=None: Stage(scanned, blocks=8, name=name)],
            head=linen_head(
                nn.Sequential([lambda x: x.mean((1, 2)), nn.Dense(int(8 * widths[-1])), nn.Dense(3)]), 3
            ),
        )

    models.register_network("mixed", Family(build, stages=1))
    ensemble = models.build_ensemble("mixed", (1, 0.5), 3)
    variables = ensemble.trace(SHAPE).init(0)
    kernels = variables["params"]["students"]["1"]["stage1"]["rest"]["Conv_0"]["kernel"]
    assert kernels.shape == (7, 3, 3, 4, 4)
    assert not np.array_equal(kernels[0], kernels[1])
    outputs, _ = forward(ensemble, variables, images_of(), train=True, key=jax.random.key(0))
    assert outputs.logits_SxBxK.shape == (2, 6, 3)


def test_what_cannot_work_gets_one_line():
    models.register_network("plain", plain_network())
    with pytest.raises(UserError, match="a network 'plain' already"):
        models.register_network("plain", plain_network())
    with pytest.raises(UserError, match="'1:x' is not a valid name"):
        models.register_network("1:x", plain_network())
    with pytest.raises(UserError, match="'block' must be a Family"):
        models.register_network("block", Block)
    with pytest.raises(UserError, match=r"there is no network 'plane'; did you mean 'plain'\?.* imported"):
        models.build_ensemble("plane")
    with pytest.raises(UserError, match="packed: it is made of plain Linen modules.*: use separate"):
        resolve({"model": {"name": "plain"}, "train": {"execution": "packed"}})
    with pytest.raises(UserError, match=r"smallest usable width is 0\.0625"):
        resolve({"model": {"name": "plain", "students": (1, 0.01)}})
    with pytest.raises(UserError, match="must leave at least one of 2 stages"):
        plain_network(shared_stages=2)
    for name, changes, message in (
        ("flat", {"stages": [lambda width: Pooling(3)]}, r"stage1 of a network .*\(B, H, W, C\)"),
        ("wide", {"head": lambda num_classes: Pooling(3)}, r"\(1, 3\) for 1 images of 10 classes"),
        ("norm", {"stages": [lambda width: nn.SpectralNorm]}, "must be a flax.linen.Module"),
        ("memory", {"stages": [lambda width: Remembering()]}, "of the kind 'memory'"),
    ):
        models.register_network(name, plain_network(**changes))
        with pytest.raises(UserError, match=message) as error:
            models.build_ensemble(name, (1,), 10).trace(SHAPE)
        assert "\n" not in str(error.value)


class Remembering(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("memory", "last", jnp.zeros, ())
        return x


def test_networks_are_listed():
    models.register_network("a_plain_one", plain_network())
    assert models.list_models("*plain*") == ["a_plain_one"]
    assert models.list_models() == sorted(models.MODELS)
    assert "resnet20" in models.list_models("resnet*")
